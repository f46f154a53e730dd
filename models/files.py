"""Opening and writing files that others may have prepared.

Takes paths and names out of manifests, returns streams of regular files only. What is checked is
the open descriptor, so that a file exchanged between a check and its use gains nobody anything.
Nothing is written through a link, and no file is emptied: what is new is written under a private
name and renamed.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import ModelError

RECORD_BYTES = 16 << 20  # a manifest of ours has thousands of bytes
LONGEST_NAME = 255  # bytes, on every file system of Linux
PRIVATE = re.compile(r"\.[0-9a-f]{16}\.part")
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
}


def is_plain_name(name) -> bool:
    """Whether a name that a file contains can be that of a file beside it.

    It has no separator, no leading dot and nothing invisible.
    """
    if not isinstance(name, str) or not name.isprintable() or name.startswith("."):
        return False
    if "/" in name or "\\" in name:
        return False
    return 0 < len(name.encode(errors="surrogatepass")) <= LONGEST_NAME


def kind_of(mode: int) -> str | None:
    """What a file of st_mode `mode` is: "a named pipe", "a link", ...; None for a regular one."""
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "no file")


def open_regular(path: str | Path, follow: bool = True) -> BinaryIO:
    """The regular file, open for reading; what may block or never end is refused unopened.

    follow: whether `path` itself may be a link. OSError if there is none; ModelError for a pipe, a
    device, a socket, a folder, or a link that is not followed.
    """
    path = Path(path)
    _check_kind(path, os.stat(path, follow_symlinks=follow).st_mode)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    return _stream(path, _open(path, flags if follow else flags | os.O_NOFOLLOW), "rb")


def read_record(stream: BinaryIO):
    """The JSON in a manifest, note or checksum list; ValueError if it is none, or far too large."""
    content = stream.read(RECORD_BYTES + 1)
    if len(content) > RECORD_BYTES:
        raise ValueError(f"it has more than {RECORD_BYTES >> 20} MB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def open_inside(folder: str | Path, name: str) -> BinaryIO:
    """A file of a checkpoint, open for reading, if what was opened lies inside the folder.

    Links into the blobs of a Hugging Face cache (snapshots/x -> ../../blobs) count as inside.
    ModelError for a link that leaves the folder, for a pipe or a device.
    """
    path = Path(folder, name)
    stream = open_regular(path)
    opened = Path(os.readlink(f"/proc/self/fd/{stream.fileno()}"))
    if any(opened.is_relative_to(place) for place in _places_of(folder)):
        return stream
    stream.close()
    raise ModelError(
        f"{path} is a link to {opened}, outside its folder, and is not copied; put the file itself "
        "there, or remove the link"
    )


def _places_of(folder: str | Path) -> list[Path]:
    """Where files of a checkpoint may lie."""
    folder = Path(folder).resolve()
    if folder.parent.name != "snapshots":
        return [folder]
    return [folder, folder.parent.parent / "blobs"]


def open_own(path: str | Path, mode: str = "r+b") -> BinaryIO:
    """A regular file of an output folder, open for reading and writing; made if missing, not emptied.

    mode: of the stream, "r+b" or "a+b". ModelError for a link, for a file that has a second name,
    for a pipe or a device.
    """
    path = Path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = _open(path, flags | (os.O_APPEND if mode.startswith("a") else 0))
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise ModelError(
            f"{path} is a second name of another file; remove it, or give another --out"
        )
    return _stream(path, descriptor, mode)


@contextmanager
def native_path(path: str | Path) -> Iterator[str]:
    """The file's name for a library in C++ or Rust, which takes every name for UTF-8.

    Where the locale writes the name in other bytes, it goes through the folder's descriptor; the
    last part of the name is then one of ours, in ASCII. What reads whole files anyway is given
    their content instead.
    """
    path = Path(path)
    if os.fsencode(path) == str(path).encode(errors="replace"):
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


@contextmanager
def new_file(path: str | Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream for the new content of `path`; whenever the process dies, it holds the old or the new.

    durable: whether the content is on the disk before it gets its name. A link at `path` is
    replaced, not followed.
    """
    with named(path), private_file(path) as private:
        with open(private, "r+b") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(private, path)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Errors of the system that name no file, such as a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def private_file(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path` under an unknown name; removed at the end unless it was renamed."""
    private = Path(path).with_name(f".{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.close(os.open(private, flags, 0o666))
    try:
        yield private
    finally:
        private.unlink(missing_ok=True)


def is_private_name(name: str) -> bool:
    """Whether `private_file` gave the name: a killed process leaves such a file."""
    return PRIVATE.fullmatch(name) is not None


def _stream(path: Path, descriptor: int, mode: str) -> BinaryIO:
    """A stream with the path as its name."""
    return open(path, mode, opener=lambda name, flags: descriptor)


def _open(path: Path, flags: int) -> int:
    """Descriptor of a regular file; ModelError for another kind, OSError as `os.open`."""
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            _check_kind(path, stat.S_IFLNK)
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket, or a pipe without a reader
            _check_kind(path, os.lstat(path).st_mode)
        raise
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except ModelError:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(path: Path, mode: int):
    kind = kind_of(mode)
    if kind == "a link":
        raise ModelError(
            f"{path} is a link, and nothing is read or written through one there; "
            "remove it, or give another folder"
        )
    if kind:
        raise ModelError(f"{path} is {kind}, not a file; remove it, or name a regular file")
