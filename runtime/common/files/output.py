"""Writing into a folder that the user named: takes paths and content, leaves nothing half-written.

The folder itself may be a link of the user's; nothing below it is reached through one, because
whoever made the folder (an archive, another user) may have put links there.
"""

import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from models.files import kind_of, new_file, open_own
from runtime.common.errors import ToolkitError
from runtime.common.notes import note

LOCK = ".lock"
PRIVATE_FOLDER = 0o700


def write_atomically(path: Path, content: str | bytes):
    """Writes the file; it holds the old content or the new one, whenever the process or the machine
    dies."""
    if isinstance(content, str):
        content = content.encode()
    with new_file(path) as stream:
        stream.write(content)


def new_text(path: Path) -> TextIO:
    """A stream of text for a file that grows while it can be read, in place of one of the same
    name; a link is replaced."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "w", encoding="utf-8", newline="")


def appended_text(path: Path) -> TextIO:
    """A stream of text that adds to the end of a file; ModelError for a link."""
    return io.TextIOWrapper(open_own(path, "a+b"), encoding="utf-8", newline="")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One writer at a time in a directory; a second one waits and says so. ModelError when the lock
    is a link."""
    with open_own(directory / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another conversion into {directory} is running, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def own_folder(folder: Path) -> Path:
    """The folder inside an output folder, made if missing; ToolkitError when a link or a file has
    its name."""
    try:
        folder.mkdir(PRIVATE_FOLDER)
    except FileExistsError:
        if folder.is_symlink() or not folder.is_dir():
            raise _refusal(folder) from None
    return folder


def work_folder(folder: Path) -> Path:
    """The folder inside an output folder in which a killed run left its work, made if missing;
    ToolkitError when anything in it is a link, a pipe or a device: no run of ours leaves such."""
    own_folder(folder)
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            kind = kind_of(path.lstat().st_mode)
            if kind not in (None, "a folder"):
                raise ToolkitError(
                    f"{path} is {kind}, which no earlier run left there; remove {folder}, then run "
                    "the same command again"
                )
    return folder


def fresh_folder(folder: Path) -> Path:
    """The folder inside an output folder, empty; ToolkitError when a link or a file has its
    name."""
    remove_folder(folder)
    return own_folder(folder)


def remove_folder(folder: Path):
    """Removes a folder and all in it, where there is one; ToolkitError when a link or a file has
    its name."""
    if folder.is_symlink() or folder.is_file():
        raise _refusal(folder)
    if folder.exists():
        shutil.rmtree(folder)


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


def _refusal(folder: Path) -> ToolkitError:
    kind = "a link" if folder.is_symlink() else "no folder"
    return ToolkitError(
        f"{folder} is {kind}, and nothing below an output folder is written through one; remove it, or give "
        "another --out"
    )
