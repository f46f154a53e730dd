"""The files of a checkpoint: which belong to it, what their headers say, how one tensor is read.

Takes a directory, returns entries (file, dtype, shape, place) and tensors. Formats: safetensors,
.bin (pickled state dicts, read as tensors only) and the SAT layout (`latest` + one .pt). Nothing
stays mapped for long, because mapped pages count as resident memory.
"""

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from models.config import read_json
from models.errors import ModelError
from models.files import is_plain_name

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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
HEADER_ALIGNMENT = 8  # tensors start on a multiple of it, as the safetensors library writes them
LFS_MARK = b"version https://git-lfs"
HEADER_LIMIT = 100 << 20  # a larger safetensors header is damage, not a header
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


def find_files(directory: Path) -> tuple[str, list[Path], dict[str, str] | None]:
    """Format, weight files, and the index's {tensor: file name} where there is one."""
    formats = [
        _indexed(directory, "safetensors", "*.safetensors"),
        _indexed(directory, "bin", "pytorch_model*.bin"),
    ]
    for name, files, index in formats:
        if any(file.exists() for file in files):
            return name, files, index
    if (directory / "latest").is_file():
        return "sat", _sat_files(directory), None
    for name, files, index in formats:
        if index is not None:
            return name, files, index
    raise ModelError(
        f"{directory} holds no weights (*.safetensors, pytorch_model*.bin, or SAT's `latest`); "
        "download the model's weight files into it"
    )


def _indexed(
    directory: Path, name: str, pattern: str
) -> tuple[str, list[Path], dict[str, str] | None]:
    indexes = sorted(
        directory.glob(f"{pattern}.index.json"),
        key=lambda p: (not p.name.startswith("model."), p.name),
    )
    if not indexes:
        return name, _with_gaps(sorted(directory.glob(pattern))), None
    content = read_json(indexes[0])
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ModelError(
            f"{indexes[0]} has no weight_map of tensor names to file names; download it again"
        )
    for file in set(index.values()):
        check_plain(file, indexes[0])
    return name, [directory / file for file in sorted(set(index.values()))], index


def check_plain(name: str, source: Path):
    """ModelError unless a name that the file `source` gives is that of a file beside it."""
    if not is_plain_name(name):
        raise ModelError(
            f"{source} names {name[:80]!r}, which is no file beside it; download the folder again"
        )


def _with_gaps(files: list[Path]) -> list[Path]:
    """Without an index, -0000k-of-0000n in the names still says which shards there should be."""
    complete = dict.fromkeys(files)
    for file in files:
        if match := re.fullmatch(r"(.+-)(\d+)-of-(\d+)(\.\w+)", file.name):
            stem, number, count, suffix = match.groups()
            for k in range(1, int(count) + 1):
                name = f"{stem}{k:0{len(number)}}-of-{count}{suffix}"
                complete[file.with_name(name)] = None
    return sorted(complete)


def _sat_files(directory: Path) -> list[Path]:
    step = (directory / "latest").read_text(encoding="utf-8").strip()
    check_plain(step, directory / "latest")
    files = sorted((directory / step).glob("mp_rank_*_model_states.pt"))
    if len(files) > 1:
        raise ModelError(
            f"{directory / step} is split over {len(files)} model-parallel ranks, only 1 can be read; "
            "merge it with SAT's own merge command first"
        )
    return files or [directory / step / "mp_rank_00_model_states.pt"]


def stored_entries(file: Path) -> dict[str, Entry]:
    """Names and entries of the tensors in one file; DamagedFile says what is wrong with it."""
    if not file.exists():
        raise DamagedFile("is missing")
    if file.is_dir():
        raise DamagedFile("is a directory, not a weight file")
    try:
        with open(file, "rb") as stream:
            if stream.read(len(LFS_MARK)) == LFS_MARK:
                raise DamagedFile("is only a Git LFS pointer, not the weights; run `git lfs pull`")
        if file.suffix == ".safetensors":
            return _safetensors_entries(file)
        return _pickled_entries(file)
    except OSError as error:
        raise DamagedFile(f"cannot be read ({reason(error)})") from None


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in `directory`, from which a family reads the layout.

    {} if a file is missing or damaged.
    """
    shapes = {}
    with suppress(ModelError, DamagedFile):
        for file in find_files(directory)[1]:
            shapes.update((name, entry.shape) for name, entry in stored_entries(file).items())
        return shapes
    return {}


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


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= min(size, HEADER_LIMIT) else b""
    if size < 8 or len(header) < length:
        raise DamagedFile(f"is truncated inside its header ({size:,} bytes)")
    data = 8 + length  # where the tensors begin
    end = data
    consistent = True
    entries = {}
    try:
        header = json.loads(header)
        header.pop("__metadata__", None)
        for name, item in header.items():
            start, stop = item["data_offsets"]
            dtype = SAFETENSORS_DTYPES[item["dtype"]]
            entries[name] = Entry(file, dtype, tuple(item["shape"]), data + start)
            end = max(end, data + stop)
            consistent = consistent and entries[name].nbytes == stop - start
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"has a damaged header ({reason(error)})") from None
    if size != end or not consistent:
        kind = "is truncated" if size < end else "is damaged"
        raise DamagedFile(f"{kind}: {size:,} bytes, its header says {end:,}")
    return entries


def _pickled_entries(file: Path) -> dict[str, Entry]:
    state = _load_pickled(file)
    return {name: Entry(file, value.dtype, tuple(value.shape)) for name, value in state.items()}


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """State dict of a .bin or .pt.

    Zip files (torch >= 1.6) are mapped, older ones are loaded whole.
    """
    with open(file, "rb") as stream:
        mapped = stream.read(2) == b"PK"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        state = state.get("module", state)  # SAT keeps the state dict one level down
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):
        raise DamagedFile(
            "is truncated, or holds more than tensors (pickled code is never run)"
        ) from None


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
        raw = np.fromfile(entry.file, np.uint8, entry.nbytes, offset=entry.offset)
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
