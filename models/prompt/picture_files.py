"""Picture files that others name: found only below the folders that they may lie in.

Takes names and folders, returns paths or bytes.
"""

import os
from pathlib import Path

from models.errors import ModelError
from models.files import kind_of

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW


class OutsideFolder(ModelError):
    """A file that lies in none of the folders it may be read from."""


def find_below(name: str, folder: Path, allowed: Path | None = None) -> Path:
    """Path of the file `name`, which is relative to `folder`, free of links.

    OutsideFolder unless it lies, links followed, below `folder` or `allowed`; ModelError if there
    is none.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutsideFolder(f"picture {name!r} is no name of a file ({error})") from None
    folders = [each.resolve() for each in (folder, allowed) if each is not None]
    if not any(path.is_relative_to(each) for each in folders):
        raise OutsideFolder(
            f"picture {name} lies outside {folder}, the folder of the jsonl file; move it there, "
            "or name the folder that may be read: --allowed-local-media-path DIR"
        )
    if not path.exists():
        raise ModelError(f"picture {path} does not exist; check its name in the jsonl file")
    return path


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
    descriptor = _open_plainly(root, target.relative_to(root).parts)
    kind = kind_of(os.fstat(descriptor).st_mode)
    if kind:
        os.close(descriptor)
        raise ModelError(f"picture {path} is {kind}; name a picture file")
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read(limit + 1)


def _open_plainly(root: Path, names: tuple[str, ...]) -> int:
    """Descriptor of the file that lies in `root` under these folders; no link is followed."""
    descriptor = os.open(root, FLAGS | os.O_DIRECTORY)
    for name in names:
        try:
            inner = os.open(name, FLAGS, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor
