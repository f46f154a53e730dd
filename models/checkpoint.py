"""A checkpoint directory in, named tensors out: safetensors shards, .bin shards or the SAT layout.

Only headers are read until a tensor is asked for. Every problem of a directory, and every difference between its names
and a weight table, is reported in one message. Tensors come one at a time, in memory of their own: safetensors are
read without mapping the file and mapped .bin files are reopened regularly, because mapped pages count as resident.
"""
import hashlib
import json
import math
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .base import ModelError, Part, Weight

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
LFS_MARK = b"version https://git-lfs"
HEADER_LIMIT = 100 << 20        # a larger safetensors header is damage, not a header
REOPEN_BYTES = 256 << 20        # a mapped .bin is reopened after this much was read from it
LARGE_BYTES = 256 << 20         # sources above are assembled first, while few targets are in memory
SHOWN = 8                       # name groups shown per kind of problem


@dataclass(frozen=True)
class Entry:
    """One stored tensor; `offset` is its first byte in a safetensors file (pickled files have None)."""
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Damaged(Exception):
    """One file cannot be used; the message continues the sentence that starts with its name."""


class Checkpoint:
    """The tensors of `directory`. `format` is "safetensors" (preferred), "bin" or "sat"; `files` are the files in use.

    Raises ModelError with every missing, truncated, unreadable or contradicting file at once.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            kind = "is a file, not a directory" if self.directory.exists() else "does not exist"
            raise ModelError(f"checkpoint {self.directory} {kind}; pass the directory that holds config.json")
        self.format, self.files, index = _find_files(self.directory)
        self._entries = _read_headers(self.directory, self.files, index)
        self._pickled = _PickledFile()

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        """Stored size in bytes."""
        return self._entries[name].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored (dtype, shape), contiguous, in its own memory."""
        entry = self._entries[name]
        if entry.offset is None:
            return self._pickled.tensor(entry.file, name)
        raw = np.fromfile(entry.file, np.uint8, entry.nbytes, offset=entry.offset)
        if raw.size < entry.nbytes:
            raise ModelError(f"{entry.file} became shorter while it was read; download it again")
        return torch.from_numpy(raw).view(entry.dtype).reshape(entry.shape)

    def check(self, weights: Iterable[Weight]) -> None:
        """Compare names and shapes with a weight table, both ways, before any tensor is read."""
        table = {weight.source: weight for weight in weights}
        missing = [n for n, w in table.items() if n not in self._entries and not w.optional]
        unknown = [n for n in self._entries if n not in table]
        wrong = {n: f"is {list(e.shape)}, expected {list(table[n].shape)}" for n, e in self._entries.items()
                 if n in table and tuple(table[n].shape) != e.shape}
        found = (_listing("missing", missing) + _listing("unknown", unknown)
                 + _listing("of wrong shape", wrong, wrong.get))
        if found:
            raise ModelError("\n".join([f"the tensors of {self.directory} do not fit its config.json:", *found,
                                        "take config.json and weights from the same release"]))

    def assemble(self, weights: Iterable[Weight], prefix: str = "", dtype: torch.dtype | None = None,
                 progress: Callable[[int, int], None] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every target that starts with `prefix` as soon as it is complete: (name, tensor in its own memory).

        Floating-point targets are converted to `dtype` (None: as stored). At most one source is in memory beside the
        targets; large sources come first, so the peak is about the sum of the targets the caller keeps.
        `progress(done, total)` counts source bytes. Raises ModelError if a target stays incomplete.
        """
        rows = [(w.source, [p for p in w.parts if p.target.startswith(prefix)]) for w in weights]
        rows = sorted([row for row in rows if row[1] and row[0] in self._entries], key=lambda row: self._order(row[0]))
        total, done, pending = sum(self.nbytes(name) for name, _ in rows), 0, {}
        for name, parts in rows:
            source = self.tensor(name)
            for part in parts:
                if _place(part, source, dtype, pending):
                    yield part.target, pending.pop(part.target)[0]
            del source
            done += self.nbytes(name)
            if progress:
                progress(done, total)
        if pending:
            raise ModelError("\n".join([f"{self.directory} has only some pieces of these weights:",
                                        *_listing("incomplete", pending)]))

    def digest(self, names: Iterable[str]) -> str:
        """sha256 (hex) of names, dtypes, shapes and bytes: the same however the tensors are sharded or packed."""
        hasher = hashlib.sha256()
        for name in sorted(names):
            entry = self._entries[name]
            hasher.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            hasher.update(self.tensor(name).reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def _order(self, name: str) -> tuple:
        entry = self._entries[name]
        if entry.nbytes > LARGE_BYTES:
            return 0, -entry.nbytes
        return 1, str(entry.file), entry.offset or 0


def read_json(path: Path) -> dict:
    """A JSON object, or ModelError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; download it from the model's release") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({_reason(error)}); download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, not an object; download it again")
    return content


def _find_files(directory: Path) -> tuple[str, list[Path], dict[str, str] | None]:
    """Format, weight files, and the index's {tensor: file name} where there is one."""
    formats = [_indexed(directory, "safetensors", "*.safetensors"), _indexed(directory, "bin", "pytorch_model*.bin")]
    for name, files, index in formats:
        if any(file.exists() for file in files):
            return name, files, index
    if (directory / "latest").is_file():
        return "sat", _sat_files(directory), None
    for name, files, index in formats:
        if index is not None:
            return name, files, index
    raise ModelError(f"{directory} holds no weights (*.safetensors, pytorch_model*.bin, or SAT's `latest`); "
                     "download the model's weight files into it")


def _indexed(directory: Path, name: str, pattern: str) -> tuple[str, list[Path], dict[str, str] | None]:
    indexes = sorted(directory.glob(f"{pattern}.index.json"), key=lambda p: (not p.name.startswith("model."), p.name))
    if not indexes:
        return name, _with_gaps(sorted(directory.glob(pattern))), None
    index = read_json(indexes[0]).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ModelError(f"{indexes[0]} has no weight_map of tensor names to file names; download it again")
    return name, [directory / file for file in sorted(set(index.values()))], index


def _with_gaps(files: list[Path]) -> list[Path]:
    """Without an index, -0000k-of-0000n in the names still says which shards there should be."""
    complete = dict.fromkeys(files)
    for file in files:
        if match := re.fullmatch(r"(.+-)(\d+)-of-(\d+)(\.\w+)", file.name):
            stem, digits, count, suffix = match[1], len(match[2]), match[3], match[4]
            names = [f"{stem}{k:0{digits}}-of-{count}{suffix}" for k in range(1, int(count) + 1)]
            complete.update(dict.fromkeys(file.with_name(name) for name in names))
    return sorted(complete)


def _sat_files(directory: Path) -> list[Path]:
    step = (directory / "latest").read_text(encoding="utf-8").strip()
    files = sorted((directory / step).glob("mp_rank_*_model_states.pt"))
    if len(files) > 1:
        raise ModelError(f"{directory / step} is split over {len(files)} model-parallel ranks, only 1 can be read; "
                         "merge it with SAT's own merge command first")
    return files or [directory / step / "mp_rank_00_model_states.pt"]


def _read_headers(directory: Path, files: list[Path], index: dict[str, str] | None) -> dict[str, Entry]:
    entries, problems, damaged = {}, [], []
    for file in files:
        try:
            stored = _stored(file)
        except Damaged as error:
            count = sum(name == file.name for name in index.values()) if index else 0
            problems.append(f"  {file.name} {error}" + (f" ({count} tensors)" if count else ""))
            damaged.append(file.name)
            continue
        if index is not None:
            problems += _contradictions(file.name, stored, index)
        elif twice := sorted(stored.keys() & entries.keys()):
            problems += _listing(f"in {file.name} and in another file", twice)
        entries.update(stored)
    if problems:
        again = f"download again: {', '.join(damaged)}" if damaged else "download index and weights again, together"
        raise ModelError("\n".join([f"the weights in {directory} are not complete:", *problems, again]))
    return entries


def _contradictions(file: str, stored: dict[str, Entry], index: dict[str, str]) -> list[str]:
    named = {name for name, where in index.items() if where == file}
    return (_listing(f"named by the index, not in {file}", sorted(named - stored.keys()))
            + _listing(f"in {file}, not named by the index", sorted(stored.keys() - named)))


def _stored(file: Path) -> dict[str, Entry]:
    """Header of one weight file; Damaged says what is wrong with it."""
    if not file.exists():
        raise Damaged("is missing")
    if file.is_dir():
        raise Damaged("is a directory, not a weight file")
    try:
        with open(file, "rb") as stream:
            if stream.read(len(LFS_MARK)) == LFS_MARK:
                raise Damaged("is only a Git LFS pointer, not the weights; run `git lfs pull`")
        return _safetensors_entries(file) if file.suffix == ".safetensors" else _pickled_entries(file)
    except OSError as error:
        raise Damaged(f"cannot be read ({_reason(error)})") from None


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= min(size, HEADER_LIMIT) else b""
    if size < 8 or len(header) < length:
        raise Damaged(f"is truncated inside its header ({size:,} bytes)")
    try:
        header = json.loads(header)
        header.pop("__metadata__", None)
        entries = {name: Entry(file, SAFETENSORS_DTYPES[item["dtype"]], tuple(item["shape"]),
                               8 + length + item["data_offsets"][0]) for name, item in header.items()}
        end = max((8 + length + item["data_offsets"][1] for item in header.values()), default=8 + length)
        consistent = all(entries[n].nbytes == i["data_offsets"][1] - i["data_offsets"][0] for n, i in header.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"has a damaged header ({_reason(error)})") from None
    if size != end or not consistent:
        kind = "is truncated" if size < end else "is damaged"
        raise Damaged(f"{kind}: {size:,} bytes, its header says {end:,}")
    return entries


def _pickled_entries(file: Path) -> dict[str, Entry]:
    return {name: Entry(file, value.dtype, tuple(value.shape)) for name, value in _load_pickled(file).items()}


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """State dict of a .bin or .pt; zip files (torch >= 1.6) are mapped, older ones are loaded whole."""
    with open(file, "rb") as stream:
        mapped = stream.read(2) == b"PK"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        state = state.get("module", state)          # SAT keeps the state dict one level down
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged("is truncated, or holds more than tensors (pickled code is never run)") from None


class _PickledFile:
    """The one pickled file that is open now; reopening it lets go of the mapped pages read so far."""

    def __init__(self):
        self.file, self.state, self.read = None, {}, 0

    def tensor(self, file: Path, name: str) -> torch.Tensor:
        if file != self.file or self.read > REOPEN_BYTES:
            self.state = {}
            self.file, self.state, self.read = file, _load_pickled(file), 0
        value = self.state[name]
        self.read += value.nbytes
        return value.clone(memory_format=torch.contiguous_format)


def _place(part: Part, source: torch.Tensor, dtype: torch.dtype | None, pending: dict) -> bool:
    """Copy one part into its target in `pending` ({name: [tensor, rows filled]}); True when the target is complete."""
    piece = source if part.take is None else source[slice(*part.take)]
    piece = part.transform(piece) if part.transform else piece
    dtype = dtype if dtype and piece.is_floating_point() else piece.dtype
    if part.at is None:
        pending[part.target] = [torch.empty(piece.shape, dtype=dtype).copy_(piece), 0]
        return True
    offset, total = part.at
    slot = pending.setdefault(part.target, [torch.empty((total, *piece.shape[1:]), dtype=dtype), 0])
    slot[0][offset:offset + len(piece)].copy_(piece)
    slot[1] += len(piece)
    return slot[1] == total


def _listing(kind: str, names: Iterable[str], detail: Callable[[str], str] = lambda name: "") -> list[str]:
    """Lines `N tensors <kind>:` and the names, those that differ in one number only on one line."""
    groups = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name, count=1), detail(name)].append(name)
    if not groups:
        return []
    lines = [f"  {sum(map(len, groups.values()))} tensors {kind}:"]
    for (template, note), members in list(groups.items())[:SHOWN]:
        label = members[0] if len(members) == 1 else f"{template} ({len(members)}x, first {members[0]})"
        lines.append(f"    {label} {note}".rstrip())
    return lines + ([f"    and {len(groups) - SHOWN} more kinds"] if len(groups) > SHOWN else [])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"
