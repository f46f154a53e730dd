"""Checksums: takes files, says what is wrong with them.

A file is read once per state (place, size, inode, times of change); the sha256 of that state is
remembered in the user's own cache. `check_again` is for those who want every byte read now.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from models.errors import ModelError
from models.files import is_plain_name, open_regular, read_record
from runtime.common.errors import ToolkitError

from .cache import cache_folder, open_private
from .output import write_atomically

CHECKSUMS = "checksums.json"
READ_BYTES = 8 << 20
_again = ContextVar("_again", default=False)


@contextmanager
def check_again(again: bool = True) -> Iterator[None]:
    """While the block runs, files are read even if their state was checked before; not so with
    `again` False."""
    token = _again.set(again)
    try:
        yield
    finally:
        _again.reset(token)


def checks_again() -> bool:
    """Whether such a block runs."""
    return _again.get()


def file_entry(path: Path) -> dict:
    """{bytes, sha256} of a file, as a manifest records it."""
    digest = hashlib.sha256()
    size = 0
    with open_regular(path) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a regular file; remembered for as long as the file stays untouched."""
    return _remembered(
        [str(path.resolve())], [path], lambda: file_entry(path)["sha256"], _again.get()
    )


def problem_of(path: Path, entry: dict, record: str = "its manifest") -> str | None:
    """What is wrong with a file of which `record` says {bytes, sha256}; None: nothing. Continues a
    sentence that begins with the file's name."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        return "is missing"
    except ModelError as error:
        return f"is no file ({error})"
    if size != entry["bytes"]:
        return f"has {size:,} bytes, {record} says {entry['bytes']:,}"
    if sha256_of(path) != entry["sha256"]:
        return f"is damaged: its bytes are not those that {record} has the sha256 of"
    return None


def write_checksums(folder: Path, names: list[str]):
    """Writes the folder's checksums.json: {bytes, sha256} of the files of these names in it."""
    entries = {name: file_entry(folder / name) for name in sorted(names)}
    write_atomically(folder / CHECKSUMS, json.dumps(entries, indent=2) + "\n")


def checksum_problems(folder: Path) -> list[str]:
    """A sentence for every file that is not as the folder's checksums.json says; none without
    one."""
    record = folder / CHECKSUMS
    try:
        with open_regular(record) as stream:
            entries = read_record(stream)
        problems = []
        for name, entry in entries.items():
            if problem := _problem_beside(folder, name, entry):
                problems.append(f"{folder / name} {problem}")
        return problems
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ModelError):
        return [f"{record} cannot be read"]


def check_checksums(folder: Path):
    """ToolkitError when a file is not as the folder's checksums.json says."""
    if problems := checksum_problems(folder):
        raise ToolkitError(
            f"{problems[0]}; copy or make the folder again, or, if you changed the file yourself, "
            f"remove {folder / CHECKSUMS}"
        )


def _problem_beside(folder: Path, name: str, entry: dict) -> str | None:
    if not is_plain_name(name):
        raise ValueError("a name that is not ours")
    return problem_of(folder / name, entry, CHECKSUMS)


def tensors_digest(checkpoint, names: list[str]) -> str:
    """Digest of a Checkpoint's tensors; remembered in the cache for as long as the weight files
    stay untouched."""
    files = checkpoint.files
    key = [names, [str(file.resolve()) for file in files]]
    return _remembered(key, files, lambda: checkpoint.digest(names))


def _remembered(key: list, files: list[Path], compute: Callable, again: bool = False) -> str:
    """compute(), or what it returned when the files were in the same state."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    memo = cache_folder("digests") / name
    states = [_state(file) for file in files]
    if not again and (known := _read_memo(memo)) and known[0] == states:
        return known[1]
    digest = compute()
    if states == [_state(file) for file in files]:
        _write_memo(memo, [states, digest])
    return digest


def _state(file: Path) -> list[int]:
    """What changes with the file. ctime cannot be set by hand, as mtime can."""
    state = file.stat()
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _read_memo(memo: Path) -> list | None:
    """[states, digest]; None where there is none that this user wrote."""
    try:
        with open_private(memo) as stream:
            states, digest = read_record(stream)
        return [states, digest] if isinstance(digest, str) else None
    except (OSError, ValueError, TypeError, ModelError):
        return None


def _write_memo(memo: Path, content: list):
    with suppress(OSError):  # a cache that cannot be written only costs time
        write_atomically(memo, json.dumps(content))
