"""A checkpoint directory: safetensors shards, .bin shards or the SAT layout (see shards.py).

Takes a directory, returns named tensors. Only headers are read until a tensor is asked for. Every
problem of a directory, and every difference between its names and a weight table, is reported in
one message. Tensors come one at a time, in memory of their own.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from models.errors import ModelError
from models.other_kinds import refuse_other_tensors

from .shards import DamagedFile, Entry, TensorReader, stored_entries
from .table import Part, Weight
from .weight_files import find_files

LARGE_BYTES = 256 << 20  # sources above are assembled first, while few targets are in memory
CONVERT_BLOCK = 1 << 18  # elements converted at a time between half formats: they stay in the cache
SHOWN = 8  # name groups shown per kind of problem
SHOWN_FILES = 40


class Checkpoint:
    """The tensors of `directory`.

    format: "safetensors" (preferred), "bin" or "sat"; files: those in use. Raises ModelError with
    every missing, truncated, unreadable or contradicting file at once.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            kind = "is a file, not a directory" if self.directory.exists() else "does not exist"
            raise ModelError(
                f"checkpoint {self.directory} {kind}; pass the directory that holds config.json"
            )
        self.format, self.files, index = find_files(self.directory)
        self._entries = _read_headers(self.directory, self.files, index)
        self._reader = TensorReader()

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
        return self._reader.tensor(name, self._entries[name])

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of the tensor; the others are not read."""
        return self._reader.tensor(name, self._entries[name].rows(first, last))

    def check(self, weights: Iterable[Weight]) -> None:
        """Compare names and shapes with a weight table, both ways, before any tensor is read."""
        table = {weight.source: weight for weight in weights}
        missing = []
        for name, weight in table.items():
            if name not in self._entries and not weight.optional:
                missing.append(name)
        unknown = []
        wrong = {}
        whole_numbers = {}
        for name, entry in self._entries.items():
            if name not in table:
                unknown.append(name)
                continue
            expected = table[name].shape
            if tuple(expected) != entry.shape:
                wrong[name] = f"is {list(entry.shape)}, expected {list(expected)}"
            if table[name].is_float and not entry.dtype.is_floating_point:
                whole_numbers[name] = f"is {entry.dtype}, expected a float type"
        found = _listing("missing", missing)
        refuse_other_tensors(self.directory, unknown)
        found += _listing("unknown", unknown)
        found += _listing("of wrong shape", wrong, wrong.get)
        found += _listing("of wrong type", whole_numbers, whole_numbers.get)
        if found:
            title = f"the tensors of {self.directory} do not fit its config.json:"
            advice = "take config.json and weights from the same release"
            raise ModelError("\n".join([title, *found, advice]))

    def assemble(
        self,
        weights: Iterable[Weight],
        prefix: str = "",
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (canonical name, tensor in its own memory) of every target once it is complete.

        Only targets whose names start with `prefix`. Floating-point ones are converted to `dtype`
        (None: as stored). `progress(done, total)` counts source bytes.

        At most one source is in memory beside the targets; large sources come first, so the peak is
        about the sum of the targets the caller keeps. Of a source whose parts all `take` some of
        its rows, only those rows are read. Raises ModelError if a target stays incomplete.
        """
        rows = self._rows_for(weights, prefix)
        total = sum(self._bytes_read(*row) for row in rows)
        done = 0
        pending = {}
        for name, parts in rows:
            source = _Source(self, name, parts)
            for part in parts:
                if _place(part, source.take(part), dtype, pending):
                    yield str(part.target), pending.pop(part.target).tensor
            done += self._bytes_read(name, parts)
            if progress:
                progress(done, total)
        if pending:
            title = f"{self.directory} has only some pieces of these weights:"
            incomplete = _listing("incomplete", map(str, pending))
            raise ModelError("\n".join([title, *incomplete]))

    def digest(self, names: Iterable[str]) -> str:
        """sha256 (hex) of names, dtypes, shapes and bytes, however the tensors are sharded."""
        hasher = hashlib.sha256()
        for name in sorted(names):
            entry = self._entries[name]
            hasher.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            hasher.update(self.tensor(name).reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def _rows_for(self, weights: Iterable[Weight], prefix: str) -> list[tuple[str, list[Part]]]:
        """(source, its parts under `prefix`) of stored tensors, in the order of reading."""
        rows = []
        for weight in weights:
            parts = [part for part in weight.parts if str(part.target).startswith(prefix)]
            if parts and weight.source in self._entries:
                rows.append((weight.source, parts))
        return sorted(rows, key=lambda row: self._order(row[0]))

    def _bytes_read(self, name: str, parts: list[Part]) -> int:
        if all(part.take for part in parts):
            return sum(self._entries[name].rows(*part.take).nbytes for part in parts)
        return self.nbytes(name)

    def _order(self, name: str) -> tuple:
        entry = self._entries[name]
        if entry.nbytes > LARGE_BYTES:
            return 0, -entry.nbytes
        return 1, str(entry.file), entry.offset or 0


def _read_headers(
    directory: Path, files: list[Path], index: dict[str, str] | None
) -> dict[str, Entry]:
    named = defaultdict(set)  # file -> the tensors that the index places in it
    for name, file in (index or {}).items():
        named[file].add(name)
    entries = {}
    problems = []
    damaged = []
    for file in files:
        try:
            stored = stored_entries(file)
        except DamagedFile as error:
            count = len(named[file.name])
            tensors = f" ({count} tensors)" if count else ""
            problems.append(f"  {file.name} {error}{tensors}")
            damaged.append(file.name)
            continue
        if index is not None:
            problems += _contradictions(file.name, stored, named[file.name])
        elif twice := sorted(stored.keys() & entries.keys()):
            problems += _listing(f"in {file.name} and in another file", twice)
        entries.update(stored)
    if problems:
        again = "download index and weights again, together"
        if damaged:
            again = f"download again: {', '.join(_first(damaged, 'files'))}"
        title = f"the weights in {directory} are not complete:"
        raise ModelError("\n".join([title, *_first(problems, "problems"), again]))
    return entries


def _first(texts: list[str], what: str) -> list[str]:
    """The texts, those beyond a screen's length counted only."""
    more = len(texts) - SHOWN_FILES
    return [*texts[:SHOWN_FILES], f"  and {more:,} more {what}"] if more > 0 else texts


def _contradictions(file: str, stored: dict[str, Entry], named: set[str]) -> list[str]:
    not_stored = _listing(f"named by the index, not in {file}", sorted(named - stored.keys()))
    not_named = _listing(f"in {file}, not named by the index", sorted(stored.keys() - named))
    return not_stored + not_named


class _Source:
    """One stored tensor while its parts are taken from it; it is freed with the last one."""

    def __init__(self, checkpoint: Checkpoint, name: str, parts: list[Part]):
        self._checkpoint = checkpoint
        self._name = name
        self._parts_left = len(parts)
        self._whole = None
        if not all(part.take for part in parts):
            self._whole = checkpoint.tensor(name)

    def take(self, part: Part) -> torch.Tensor:
        """The stored rows that make the part."""
        whole = self._whole
        if whole is None:
            return self._checkpoint.rows(self._name, *part.take)
        self._parts_left -= 1
        if not self._parts_left:
            self._whole = None
        return whole if part.take is None else whole[slice(*part.take)]


@dataclass
class _Pending:
    """A target of which `rows` rows have been filled."""

    tensor: torch.Tensor
    rows: int = 0


def _place(part: Part, piece: torch.Tensor, dtype: torch.dtype | None, pending: dict) -> bool:
    """Copies a part into its target in `pending` {Target: _Pending}; True when that is complete."""
    piece = part.transform(piece) if part.transform else piece
    dtype = dtype if dtype and piece.is_floating_point() else piece.dtype
    if part.at is None:
        pending[part.target] = _Pending(_copy(piece, torch.empty(piece.shape, dtype=dtype)))
        return True
    offset, total = part.at
    if part.target not in pending:
        shape = (total, *piece.shape[1:])
        pending[part.target] = _Pending(torch.empty(shape, dtype=dtype))
    target = pending[part.target]
    _copy(piece, target.tensor[offset : offset + len(piece)])
    target.rows += len(piece)
    return target.rows == total


def _copy(piece: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """`into.copy_(piece)`.

    Matrices that change dtype go through fp32 block by block, 4x faster than fp16 -> bf16.
    """
    if piece.dtype == into.dtype or piece.dim() < 2:
        return into.copy_(piece)
    rows = max(1, CONVERT_BLOCK // max(1, math.prod(piece.shape[1:])))
    for source, target in zip(piece.split(rows), into.split(rows), strict=True):
        target.copy_(source.float())
    return into


def _listing(
    kind: str, names: Iterable[str], detail: Callable[[str], str] = lambda name: ""
) -> list[str]:
    """Lines `N tensors <kind>:` and the names; those that differ in one number share a line."""
    groups = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name, count=1), detail(name)].append(name)
    if not groups:
        return []
    count = sum(map(len, groups.values()))
    plural = "s" if count > 1 else ""
    shown = list(groups.items())[:SHOWN]
    lines = [f"  {count} tensor{plural} {kind}:"]
    for (template, note), members in shown:
        label = members[0]
        if len(members) > 1:
            label = f"{template} ({len(members)}x, first {members[0]})"
        lines.append(f"    {label} {note}".rstrip())
    if len(groups) > SHOWN:
        lines.append(f"    and {len(groups) - SHOWN} more kinds")
    return lines
