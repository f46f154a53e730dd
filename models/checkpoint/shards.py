"""The weight files of a checkpoint: what their headers say, how one tensor is read.

Takes files, returns entries (file, dtype, shape, place) and tensors. Formats: safetensors,
.bin (pickled state dicts, read as tensors only) and the SAT layout (`latest` + one .pt). Nothing
stays mapped for long, because mapped pages count as resident memory.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from models.errors import ModelError
from models.files import kind_of, native_path, open_regular
from models.side_fields import is_whole
from models.side_files import parse_json, stand_in

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
HEADER_ALIGNMENT = 8  # tensors start on a multiple of it, as the safetensors library writes them
FIRST_BYTES = 100  # of which a pointer or a web page is known
HEADER_LIMIT = 16 << 20  # a larger safetensors header is damage, not a header
LARGEST = 1 << 48  # of a length or an offset in a header
MOST_AXES = 8
REOPEN_BYTES = 256 << 20  # a mapped .bin is reopened after this much was read from it


@dataclass(frozen=True)
class Entry:
    """One stored tensor, or some of its rows, from `first` on.

    `offset`: its first byte in a safetensors file; None in a pickled one.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None = None
    first: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> "Entry":
        """The entry of rows [first, last)."""
        part = replace(self, shape=(last - first, *self.shape[1:]), first=first)
        skipped = first * self.nbytes // self.shape[0]
        return part if self.offset is None else replace(part, offset=self.offset + skipped)


class DamagedFile(Exception):
    """One file cannot be used; the message continues the sentence that starts with its name."""


def stored_entries(file: Path) -> dict[str, Entry]:
    """Names and entries of the tensors in one weight file; DamagedFile says what is wrong with it."""
    try:
        kind = kind_of(os.stat(file).st_mode)
        if kind:
            raise DamagedFile(f"is {kind}, not a weight file")
        with open_regular(file) as stream:
            if problem := stand_in(stream.read(FIRST_BYTES)):
                raise DamagedFile(problem)
            if file.suffix == ".safetensors":
                return _safetensors_entries(file, stream)
        return _pickled_entries(file)
    except FileNotFoundError:
        raise DamagedFile("is missing") from None
    except OSError as error:
        raise DamagedFile(f"cannot be read ({reason(error)})") from None


def grouped_by_size(items: Iterable, nbytes_of: Callable, limit: int) -> list[list]:
    """Items of each shard to write, in order: at most `limit` bytes, or a single larger tensor."""
    groups = [[]]
    size = 0
    for item in items:
        nbytes = nbytes_of(item)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += nbytes
    return groups


def safetensors_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """What a safetensors file of (name, dtype, shape) begins with: 8 bytes of length, then JSON."""
    header = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        start = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _safetensors_entries(file: Path, stream: BinaryIO) -> dict[str, Entry]:
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if HEADER_LIMIT < length <= size - 8:
        raise DamagedFile(f"has a header of {length:,} bytes; {HEADER_LIMIT:,} is the most")
    header = stream.read(length) if length <= size else b""
    if size < 8 or len(header) < length:
        raise DamagedFile(f"is truncated inside its header ({size:,} bytes)")
    data = 8 + length  # where the tensors begin
    try:
        header = parse_json(header.decode(), file)
        header.pop("__metadata__", None)
        entries = {name: _entry(file, item, data) for name, item in header.items()}
    except (ModelError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedFile(f"has a damaged header ({reason(error)})") from None
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=data)
    if size != end:
        kind = "is truncated" if size < end else "is damaged"
        raise DamagedFile(f"{kind}: {size:,} bytes, its header says {end:,}")
    return entries


def _entry(file: Path, item: dict, data: int) -> Entry:
    """What a header says about one tensor; ValueError unless its place has the size of its shape."""
    shape = item["shape"]
    start, stop = item["data_offsets"]
    if len(shape) > MOST_AXES or not all(is_whole(n, 0, LARGEST) for n in (*shape, start, stop)):
        raise ValueError("shapes and offsets must be whole numbers")
    entry = Entry(file, SAFETENSORS_DTYPES[item["dtype"]], tuple(shape), data + start)
    if entry.nbytes != stop - start:
        raise ValueError(f"{stop - start:,} bytes for the shape {shape}")
    return entry


def _pickled_entries(file: Path) -> dict[str, Entry]:
    state = _load_pickled(file)
    return {name: Entry(file, value.dtype, tuple(value.shape)) for name, value in state.items()}


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """State dict of a .bin or .pt.

    Zip files (torch >= 1.6) are mapped, older ones are loaded whole.
    """
    try:
        mapped = _is_zip(file)
        with native_path(file) as path:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        state = state.get("module", state)  # SAT keeps the state dict one level down
        plain = {name: value for name, value in state.items() if _is_plain_tensor(name, value)}
        return {name: value.detach() for name, value in plain.items()}
    except DamagedFile:
        raise
    except Exception:  # a pickle is a program for torch's reader: it may fail in any way
        raise DamagedFile(
            "is truncated, or holds more than tensors (pickled code is never run)"
        ) from None


def _is_zip(file: Path) -> bool:
    """Whether torch >= 1.6 wrote it. DamagedFile if anything in it is compressed, which torch never
    writes: a few MB would fill the memory."""
    with open_regular(file) as stream:
        if stream.read(2) != b"PK":
            return False
        with zipfile.ZipFile(stream) as archive:
            records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise DamagedFile("is compressed, as torch writes no weights; download it again")
    return True


def _is_plain_tensor(name, value) -> bool:
    tensor = isinstance(name, str) and isinstance(value, torch.Tensor)
    if not tensor or value.is_meta:
        return False
    return value.layout is torch.strided and not value.is_quantized


class TensorReader:
    """Reads tensors into memory of their own.

    One pickled file is open at a time; reopening it now and then frees the mapped pages.
    """

    def __init__(self):
        self.file = None
        self.state = {}
        self.read = 0

    def tensor(self, name: str, entry: Entry) -> torch.Tensor:
        """The stored tensor, contiguous; ModelError if the file is shorter than when opened."""
        if entry.offset is None:
            return _raw(np.empty(entry.nbytes, np.uint8), entry).copy_(self._pickled(name, entry))
        with open_regular(entry.file) as stream:
            raw = np.fromfile(stream, np.uint8, entry.nbytes, offset=entry.offset)
        if raw.size < entry.nbytes:
            raise ModelError(f"{entry.file} became shorter while it was read; download it again")
        return _raw(raw, entry)

    def _pickled(self, name: str, entry: Entry) -> torch.Tensor:
        if entry.file != self.file or self.read > REOPEN_BYTES:
            self.state = {}  # close the old one first: two shards of an old format may not fit
            try:
                self.file = entry.file
                self.state = _load_pickled(entry.file)
                self.read = 0
            except DamagedFile as error:
                raise ModelError(f"{entry.file} changed while it was read: it {error}") from None
        self.read += entry.nbytes
        tensor = self.state[name]
        return tensor[entry.first : entry.first + entry.shape[0]] if entry.shape else tensor


def _raw(memory: np.ndarray, entry: Entry) -> torch.Tensor:
    """Bytes as the entry's tensor.

    The memory is numpy's, because malloc cannot fill the holes that torch's aligned blocks leave.
    """
    return torch.from_numpy(memory).view(entry.dtype).reshape(entry.shape)


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"
