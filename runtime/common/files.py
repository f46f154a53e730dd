"""Files that are whole or absent: atomic writes, locks, the cache folder, digests.

Takes paths and text, returns nothing half-written.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .errors import ToolkitError
from .notes import note

LOCK = ".lock"
READ_BYTES = 8 << 20


def write_atomically(path: Path, text: str):
    """Writes the file; it holds the old text or the new one, whenever the process or the machine
    dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tensors_digest(checkpoint, names: list[str]) -> str:
    """Digest of a Checkpoint's tensors; remembered in the cache for as long as the weight files
    stay untouched."""
    states = []
    for file in checkpoint.files:
        state = file.stat()
        states.append([str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
    key = hashlib.sha256(json.dumps([names, states]).encode()).hexdigest()
    memo = cache_root() / "digests" / key
    if memo.is_file():
        return memo.read_text(encoding="ascii")
    digest = checkpoint.digest(names)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, digest)
    except OSError:
        pass  # a cache that cannot be written only costs time
    return digest


def cache_root() -> Path:
    """$ASCEND_VLM_CACHE, else a folder below the home."""
    return Path(os.environ.get("ASCEND_VLM_CACHE") or Path.home() / ".cache" / "ascend-vlm")


@contextmanager
def locked(directory: Path):
    """One converter at a time in a directory; a second one waits and says so."""
    with open(directory / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another conversion into {directory} is running, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(out: str) -> Path:
    """The folder --out, made and tried before anything slow begins; ToolkitError if it cannot be
    written."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ToolkitError(
            f"--out {out} cannot be written ({error.strerror}); give another folder"
        ) from None
