"""A checkpoint directory in, named tensors out: safetensors shards, .bin shards or the SAT layout (see shards.py).

Only headers are read until a tensor is asked for. Every problem of a directory, and every difference between its names
and a weight table, is reported in one message. Tensors come one at a time, in memory of their own.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from models.errors import ModelError

from .shards import Damaged, Entry, TensorReader, find_files, stored_entries
from .table import Part, Weight

LARGE_BYTES = 256 << 20  # sources above are assembled first, while few targets are in memory
CONVERT_BLOCK = (
    1 << 18
)  # elements converted at a time between half formats: what stays in the cache
SHOWN = 8  # name groups shown per kind of problem


class Checkpoint:
    """The tensors of `directory`. `format` is "safetensors" (preferred), "bin" or "sat"; `files` are the files in use.

    Raises ModelError with every missing, truncated, unreadable or contradicting file at once.
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

    def check(self, weights: Iterable[Weight]) -> None:
        """Compare names and shapes with a weight table, both ways, before any tensor is read."""
        table = {weight.source: weight for weight in weights}
        missing = [n for n, w in table.items() if n not in self._entries and not w.optional]
        unknown = [n for n in self._entries if n not in table]
        wrong = {
            n: f"is {list(e.shape)}, expected {list(table[n].shape)}"
            for n, e in self._entries.items()
            if n in table and tuple(table[n].shape) != e.shape
        }
        found = (
            _listing("missing", missing)
            + _listing("unknown", unknown)
            + _listing("of wrong shape", wrong, wrong.get)
        )
        if found:
            raise ModelError(
                "\n".join(
                    [
                        f"the tensors of {self.directory} do not fit its config.json:",
                        *found,
                        "take config.json and weights from the same release",
                    ]
                )
            )

    def assemble(
        self,
        weights: Iterable[Weight],
        prefix: str = "",
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every target that starts with `prefix` as soon as it is complete: (name, tensor in its own memory).

        Floating-point targets are converted to `dtype` (None: as stored). At most one source is in memory beside the
        targets; large sources come first, so the peak is about the sum of the targets the caller keeps. Of a source whose
        parts all `take` some of its rows, only those rows are read.
        `progress(done, total)` counts source bytes. Raises ModelError if a target stays incomplete.
        """
        rows = [
            (w.source, [p for p in w.parts if str(p.target).startswith(prefix)]) for w in weights
        ]
        rows = sorted(
            [row for row in rows if row[1] and row[0] in self._entries],
            key=lambda row: self._order(row[0]),
        )
        total = sum(self._bytes_read(*row) for row in rows)
        done = 0
        pending = {}
        for name, parts in rows:
            whole = None if all(part.take for part in parts) else self.tensor(name)
            for part in parts:
                piece = self._piece(name, part, whole)
                done += piece.nbytes if whole is None else 0
                complete = _place(part, piece, dtype, pending)
                if whole is not None and part is parts[-1]:
                    done += whole.nbytes
                    whole = None
                del piece  # not in memory while the caller works on the target
                if complete:
                    yield str(part.target), pending.pop(part.target)[0]
            if progress:
                progress(done, total)
        if pending:
            raise ModelError(
                "\n".join(
                    [
                        f"{self.directory} has only some pieces of these weights:",
                        *_listing("incomplete", map(str, pending)),
                    ]
                )
            )

    def digest(self, names: Iterable[str]) -> str:
        """sha256 (hex) of names, dtypes, shapes and bytes: the same however the tensors are sharded or packed."""
        hasher = hashlib.sha256()
        for name in sorted(names):
            entry = self._entries[name]
            hasher.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            hasher.update(self.tensor(name).reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def _piece(self, name: str, part: Part, whole: torch.Tensor | None) -> torch.Tensor:
        if whole is None:
            return self._reader.tensor(name, self._entries[name].rows(*part.take))
        return whole if part.take is None else whole[slice(*part.take)]

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
    entries = {}
    problems = []
    damaged = []
    for file in files:
        try:
            stored = stored_entries(file)
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
        again = (
            f"download again: {', '.join(damaged)}"
            if damaged
            else "download index and weights again, together"
        )
        raise ModelError(
            "\n".join([f"the weights in {directory} are not complete:", *problems, again])
        )
    return entries


def _contradictions(file: str, stored: dict[str, Entry], index: dict[str, str]) -> list[str]:
    named = {name for name, where in index.items() if where == file}
    return _listing(f"named by the index, not in {file}", sorted(named - stored.keys())) + _listing(
        f"in {file}, not named by the index", sorted(stored.keys() - named)
    )


def _place(part: Part, piece: torch.Tensor, dtype: torch.dtype | None, pending: dict) -> bool:
    """Copy one part into its target in `pending` ({name: [tensor, rows filled]}); True when the target is complete."""
    piece = part.transform(piece) if part.transform else piece
    dtype = dtype if dtype and piece.is_floating_point() else piece.dtype
    if part.at is None:
        pending[part.target] = [_copy(piece, torch.empty(piece.shape, dtype=dtype)), 0]
        return True
    offset, total = part.at
    slot = pending.setdefault(part.target, [torch.empty((total, *piece.shape[1:]), dtype=dtype), 0])
    _copy(piece, slot[0][offset : offset + len(piece)])
    slot[1] += len(piece)
    return slot[1] == total


def _copy(piece: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """`into.copy_(piece)`; matrices that change dtype go through fp32 block by block, 4x faster than fp16 -> bf16."""
    if piece.dtype == into.dtype or piece.dim() < 2:
        return into.copy_(piece)
    rows = max(1, CONVERT_BLOCK // max(1, math.prod(piece.shape[1:])))
    for source, target in zip(piece.split(rows), into.split(rows), strict=True):
        target.copy_(source.float())
    return into


def _listing(
    kind: str, names: Iterable[str], detail: Callable[[str], str] = lambda name: ""
) -> list[str]:
    """Lines `N tensors <kind>:` and the names, those that differ in one number only on one line."""
    groups = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name, count=1), detail(name)].append(name)
    if not groups:
        return []
    count = sum(map(len, groups.values()))
    lines = [f"  {count} tensor{'s' * (count > 1)} {kind}:"]
    for (template, note), members in list(groups.items())[:SHOWN]:
        label = (
            members[0] if len(members) == 1 else f"{template} ({len(members)}x, first {members[0]})"
        )
        lines.append(f"    {label} {note}".rstrip())
    return lines + ([f"    and {len(groups) - SHOWN} more kinds"] if len(groups) > SHOWN else [])
