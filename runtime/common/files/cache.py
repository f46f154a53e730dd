"""The toolkit's cache: takes names, returns a folder that only this user can write.

Compiled kernels and packed weights are loaded from it, so a folder that somebody else may write, or
owns, is not used: what another user puts there would run in our process. $ASCEND_VLM_CACHE comes
first, then the folder below the home, then one that lives as long as the process.
"""

import atexit
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from models.errors import ModelError
from models.files import open_regular
from runtime.common.notes import note

from .output import PRIVATE_FOLDER

VARIABLE = "ASCEND_VLM_CACHE"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """$ASCEND_VLM_CACHE, else a folder below the home; another one, with a note, where others could
    write there."""
    return cache_folder()


def cache_folder(*names: str) -> Path:
    """The folder of these names below the cache's root, made if missing and if it can be made.

    A note says so when it is not the one that the user named, because others may write there.
    """
    refused = None
    for root in _roots():
        folder = root.joinpath(*names)
        problem = _problem(root, names)
        if problem is None:
            if refused:
                _note_once(
                    f"{refused}; using {folder} instead (set {VARIABLE} to a folder of yours)"
                )
            return folder
        refused = refused or problem
    raise AssertionError("a temporary folder of our own is private")


def open_private(path: Path) -> BinaryIO:
    """A file of the cache, open for reading; ModelError for a link, or if somebody else owns or may
    write it."""
    stream = open_regular(path, follow=False)
    state = os.fstat(stream.fileno())
    if _is_private(state):
        return stream
    stream.close()
    raise ModelError(f"{path} {_who(state)}")


def _is_private(state: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user or root, and nobody else may write it."""
    return state.st_uid in (os.geteuid(), 0) and not state.st_mode & WRITABLE_BY_OTHERS


def _roots() -> Iterator[Path]:
    named = os.environ.get(VARIABLE)
    if named:
        yield Path(named)
    with suppress(RuntimeError):  # a user without a home
        yield Path.home() / ".cache" / "ascend-vlm"
    yield _temporary_root()


@functools.cache
def _temporary_root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="ascend-vlm-"))
    atexit.register(_remove_in, os.getpid(), root)
    return root


def _remove_in(process: int, root: Path):
    """Remove the folder if this is the process that made it, and not one that it forked."""
    if os.getpid() == process:
        shutil.rmtree(root, ignore_errors=True)


def _problem(root: Path, names: tuple[str, ...]) -> str | None:
    """Makes the folders; why they cannot be used. A folder that cannot be made is no problem here:
    nothing is in it, and whoever writes there says so."""
    folder = root
    for name in ("", *names):
        folder = folder / name
        try:
            folder.mkdir(PRIVATE_FOLDER, parents=folder == root, exist_ok=True)
            state = os.stat(folder)
        except OSError:
            return None
        if folder != root and folder.is_symlink():
            return f"the cache folder {folder} is a link"
        if not _is_private(state):
            return f"the cache folder {folder} {_who(state)}"
    return _open_parent(root)


def _open_parent(root: Path) -> str | None:
    """A parent in which everybody may rename the folder (no sticky bit)."""
    for parent in root.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"the cache folder {root} lies in {parent}, which everybody may write"
    return None


def _who(state: os.stat_result) -> str:
    if state.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {state.st_uid}"
    return f"may be written by others (mode {stat.S_IMODE(state.st_mode):o})"


@functools.cache
def _note_once(text: str):
    note(text)
