"""Picture files that others name: found only below the folders that they may lie in.

Takes names and folders, returns files that are opened without following a link, so that what was
checked is what is read.
"""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from models.errors import ModelError
from models.files import kind_of

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
FILE_URL = re.compile("file:", re.IGNORECASE)
A_LINK_NOW = (errno.ELOOP, errno.ENOTDIR)  # what opening a link gives, and what lies behind it


class OutsideFolder(ModelError):
    """A file that lies in none of the folders it may be read from."""


@dataclass(frozen=True)
class FileBelow:
    """A file by the plain names that lead to it from `root`; every link was followed before."""

    root: Path
    names: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.root.joinpath(*self.names))

    __str__ = __fspath__

    def open(self) -> BinaryIO:
        """Every folder on the way is opened by its plain name, so that nobody can put a link in its
        place meanwhile. OutsideFolder if somebody did; ModelError for what is no file; OSError."""
        try:
            return os.fdopen(self._descriptor(), "rb")
        except OSError as error:
            if error.errno not in A_LINK_NOW:
                raise
            raise OutsideFolder(
                f"picture {self} was exchanged for a link while it was read; nobody may change "
                f"{self.root} meanwhile"
            ) from None

    def _descriptor(self) -> int:
        """A device or a pipe is refused unopened, and what was opened is looked at once more."""
        *folders, name = self.names or (".",)
        folder = os.open(self.root, FLAGS | os.O_DIRECTORY)
        try:
            for inner in folders:
                outer = folder
                folder = os.open(inner, FLAGS | os.O_DIRECTORY, dir_fd=outer)
                os.close(outer)
            state = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if kind_of(state.st_mode) != "a link":
                self._check(state)
            descriptor = os.open(name, FLAGS, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            self._check(os.fstat(descriptor))
        except ModelError:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, state: os.stat_result):
        if kind := kind_of(state.st_mode):
            raise ModelError(f"picture {self} is {kind}; name a picture file")


def path_of(name: str) -> str:
    """The path that a file: URL names, any other name unchanged. file:///a/b.png and
    file://localhost/a/b.png are absolute; file://b.png and file:b.png, as people write it, are
    relative."""
    if not FILE_URL.match(name):
        return name
    try:
        parts = urlsplit(name)
    except ValueError:  # brackets that are no address
        return name
    folder = "" if parts.netloc == "localhost" else parts.netloc
    return unquote(folder + parts.path)


def find_below(name: str, folder: Path, allowed: Path | None = None) -> FileBelow:
    """The file `name`, a path or a file: URL, which is relative to `folder`.

    OutsideFolder unless it lies, links followed, below `folder` or `allowed`; ModelError if there
    is none.
    """
    try:
        path = (folder / path_of(name)).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutsideFolder(f"picture {name!r} is no name of a file ({error})") from None
    folders = [each.resolve() for each in (folder, allowed) if each is not None]
    root = next((each for each in folders if path.is_relative_to(each)), None)
    if root is None:
        raise OutsideFolder(
            f"picture {name} lies outside {folder}, the folder of the jsonl file; move it there, "
            "or name the folder that may be read: --allowed-local-media-path DIR"
        )
    if not path.exists():
        raise ModelError(f"picture {path} does not exist; check its name in the jsonl file")
    return FileBelow(root, path.relative_to(root).parts)


def read_below(name: str, folder: Path, limit: int) -> bytes:
    """The file `name`, a path or a file: URL, relative to `folder` or absolute, up to limit + 1
    bytes.

    OutsideFolder for a file elsewhere, links followed; OSError, ValueError or ModelError for one
    that cannot be read.
    """
    root = folder.resolve()
    target = (root / path_of(name)).resolve(strict=True)
    if not target.is_relative_to(root):
        raise OutsideFolder(f"picture {name} lies outside {folder}")
    with FileBelow(root, target.relative_to(root).parts).open() as stream:
        return stream.read(limit + 1)
