"""Picture files: opened without waiting, and only below the folders that they may lie in.

Takes names and folders, returns paths, open files or bytes.
"""

import os
import stat
from pathlib import Path

from models.errors import ModelError

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a named pipe must not be waited for


class OutsideFolder(ModelError):
    """A file that lies in none of the folders it may be read from."""


def open_file(path):
    """The file at `path`, open for reading. ModelError for a named pipe, device or socket, OSError
    for what the system refuses."""
    return _as_stream(os.open(path, FLAGS), f"picture {path}")


def find_below(name: str, folder: Path, allowed: Path | None = None) -> Path:
    """Path of the file `name`, which is relative to `folder`, free of links.

    OutsideFolder unless it lies, links followed, below `folder` or `allowed`.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutsideFolder(f"picture {name!r} is no name of a file ({error})") from None
    for each in (folder, allowed):
        if each is not None and path.is_relative_to(each.resolve()):
            return path
    raise OutsideFolder(
        f"picture {name} lies outside {folder}, the folder of the jsonl file; move it there, or "
        "name the folder that may be read: --allowed-local-media-path DIR"
    )


def read_below(path: str, folder: Path, limit: int) -> bytes:
    """The file at `path`, relative to `folder` or absolute, up to limit + 1 bytes.

    Links may lead to files below the folder; they are followed once, and then every folder on the
    way is opened by its plain name, so that nobody can put another link in its place meanwhile.
    OutsideFolder for a file elsewhere; OSError, ValueError or ModelError for one that cannot be
    read.
    """
    root = folder.resolve()
    target = (root / path).resolve(strict=True)
    if not target.is_relative_to(root):
        raise OutsideFolder(f"picture {path} lies outside {folder}")
    with _as_stream(_open_plainly(root, target.relative_to(root).parts), "the picture") as stream:
        return stream.read(limit + 1)


def _open_plainly(root: Path, names: tuple[str, ...]) -> int:
    """Descriptor of the file that lies in `root` under these folders; no link is followed."""
    descriptor = os.open(root, FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW)
    for name in names:
        try:
            inner = os.open(name, FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def _as_stream(descriptor: int, name: str):
    """The descriptor of a plain file as a stream. ModelError for what is none."""
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = "a directory" if stat.S_ISDIR(kind) else "a pipe, a device or a socket"
        raise ModelError(f"{name} is {what}; name one picture file")
    return open(descriptor, "rb")
