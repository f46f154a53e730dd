"""Checksums: takes files, says what is wrong with them.

A file is read once per state (place, size, inode, times of change); the sha256 of that state is remembered in the user's
own cache. `check_again` is for those who want every byte read now.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from models.errors import ModelError
from models.files import open_regular

from .cache import cache_folder, open_private
from .output import write_atomically

READ_BYTES = 8 << 20
_again = ContextVar("_again", default=False)


@contextmanager
def check_again() -> Iterator[None]:
    """While the block runs, files are read even if their state was checked before."""
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


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
    """What is wrong with a file of which `record` says {bytes, sha256}; None: nothing. Continues a sentence that begins
    with the file's name."""
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


def tensors_digest(checkpoint, names: list[str]) -> str:
    """Digest of a Checkpoint's tensors; remembered in the cache for as long as the weight files stay untouched."""
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
            states, digest = json.load(stream)
        return [states, digest] if isinstance(digest, str) else None
    except (OSError, ValueError, TypeError, ModelError):
        return None


def _write_memo(memo: Path, content: list):
    with suppress(OSError):  # a cache that cannot be written only costs time
        write_atomically(memo, json.dumps(content))
