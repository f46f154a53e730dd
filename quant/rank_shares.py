"""The share of a checkpoint that each rank of a tensor-parallel run holds, in the checkpoint's order
of rows. MindIE reads compressed (W8A8SC) weights so, from one folder partR-of-N per rank, under the
names of its modules.

Takes a family, a split and the name of a stored tensor; returns the rank's Share of it. Which rows
and columns those are is the runtime's rule (runtime/parallel/split.py); here it is applied to
stored tensors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from models.checkpoint.quantized import SCALARS, STATIC, Description
from models.checkpoint.reader import SHOWN, Checkpoint
from models.checkpoint.table import Part, Weight
from models.errors import ModelError
from runtime.parallel.split import COLUMNS, ROWS, Split

NAME = re.compile(r"part(\d+)-of-(\d+)")
COMPUTED = (".inv_freq", ".position_ids")
CHATGLM = "transformer.encoder."  # how the layers' names begin in the chatglm layout


def part_name(rank: int, size: int) -> str:
    return f"part{rank}-of-{size}"


def part_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """{(rank, size): folder} in `folder`, of however many splits."""
    found = {}
    for file in folder.glob("part*"):
        if match := NAME.fullmatch(file.name):
            found[int(match[1]), int(match[2])] = file
    return found


def find_parts(folder: Path) -> list[Path]:
    """The folders part0-of-N ... in `folder`, by rank, [] if there are none; ModelError if one is
    missing or they are of several splits."""
    found = part_folders(folder).keys()
    if not found:
        return []
    size = max(size for _, size in found)
    if found != {(rank, size) for rank in range(size)}:
        raise ModelError(
            f"{folder} does not hold {part_name(0, size)} to {part_name(size - 1, size)} and nothing else "
            f"(found: {', '.join(part_name(*part) for part in sorted(found))}); compress into an empty folder"
        )
    return [folder / part_name(rank, size) for rank in range(size)]


@dataclass
class Share:
    """rows, columns: those of the whole tensor that the rank holds, None for all. zero: the rank
    holds zeros, because another rank adds the tensor to the sum over the ranks."""

    rows: torch.Tensor | None = None
    columns: slice | None = None
    zero: bool = False

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        shape = list(whole)
        if self.rows is not None:
            shape[0] = len(self.rows)
        if self.columns is not None:
            shape[1] = self.columns.stop - self.columns.start
        return tuple(shape)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            tensor = tensor[self.rows]
        if self.columns is not None:
            tensor = tensor[:, self.columns]
        return torch.zeros_like(tensor) if self.zero else tensor


class Shares:
    """Shares of the tensors of a family's checkpoint, float or quantised."""

    def __init__(self, family, split: Split):
        self._split = split
        self._rows = {row.source: row for row in family.weights()}
        self._root = ""
        if any(source.startswith(CHATGLM) for source in self._rows):
            self._root = "transformer."

    def name(self, source: str) -> str:
        """What the tensor is called in a rank's folder: as MindIE's module, which is the
        checkpoint's name, in the chatglm layout without "transformer."."""
        return source.removeprefix(self._root)

    def is_needed(self, source: str) -> bool:
        """False for tables that every engine computes itself."""
        return not source.endswith(COMPUTED) or bool(self._rows[source].parts)

    def of(self, name: str) -> Share:
        """Of a stored tensor; those of a quantised layer follow its weight."""
        layer, _, tensor = name.rpartition(".")
        row = self._rows.get(f"{layer}.weight")
        roles = {_role(part) for part in row.parts} if row else set()
        if self._split.size == 1 or not roles or tensor in SCALARS:
            return Share()
        if roles <= set(ROWS):
            return Share(rows=_held_rows(row, self._split))
        if roles <= set(COLUMNS):
            if tensor == "weight":
                return Share(columns=slice(*self._split.span(row.shape[1])))
            return Share(zero=self._split.rank > 0 and tensor in ("bias", "quant_bias"))
        return Share()

    def required(self) -> set[str]:
        """Names of the float checkpoint's tensors that must be in the rank's folder."""
        return {self.name(row.source) for row in self._rows.values() if not row.optional}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the float checkpoint's tensors in the rank's folder, with those that may
        be left out."""
        shapes = {}
        for source, row in self._rows.items():
            shapes[self.name(source)] = self.of(source).shape(row.shape)
        return shapes


def check_parts(family, description: Description, checkpoint: Checkpoint, split: Split):
    """ModelError unless `checkpoint` holds every tensor of the rank under its name, and in its
    shape where it has one."""
    shares = Shares(family, split)
    expected = shares.shapes()
    layers = {_layer(name) for name in expected}
    compressed = _layers_of_kind(description, "W8A8SC")
    wrong = [
        *_missing(shares.required(), compressed, description, checkpoint),
        *_foreign(layers, checkpoint),
        *_misshapen(expected, compressed, checkpoint),
        *_of_other_weights(expected, compressed & layers, checkpoint),
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors of {checkpoint.directory} do not fit config.json: {'; '.join(wrong[:SHOWN])}"
        )


def _missing(required, compressed, description, checkpoint) -> Iterator[str]:
    """Tensors that are not stored; the bias of a static layer is in its quant_bias."""
    static = set(compressed)
    for kind in STATIC:
        static |= _layers_of_kind(description, kind)
    for name in sorted(required - set(checkpoint.names)):
        in_quant_bias = name.endswith(".bias") and name.removesuffix(".bias") in static
        if not in_quant_bias:
            yield f"{name} is missing"


def _foreign(layers, checkpoint) -> Iterator[str]:
    """Tensors of no layer of the family."""
    for name in checkpoint.names:
        if _layer(name).removesuffix(".module") not in layers:
            yield f"{name} belongs to no layer"


def _misshapen(expected, compressed, checkpoint) -> Iterator[str]:
    for name, shape in checkpoint.shapes.items():
        if name not in expected or name.removesuffix(".weight") in compressed:
            continue
        if shape != expected[name]:
            yield f"{name} is {list(shape)}, not {list(expected[name])}"


def _of_other_weights(expected, compressed, checkpoint) -> Iterator[str]:
    """Compressed layers whose info = (..., ..., k, n, 1) is not of the rank's weight [n, k]."""
    for layer in sorted(compressed):
        if f"{layer}.info" not in checkpoint.names:
            continue
        info = checkpoint.tensor(f"{layer}.info").tolist()
        found = info[3:1:-1]
        wanted = list(expected[f"{layer}.weight"])
        if found != wanted:
            yield f"{layer}.info is of a weight {found}, not {wanted}"


def _layer(name: str) -> str:
    """The linear layer or norm to which the tensor belongs."""
    return name.rpartition(".")[0]


def _layers_of_kind(description: Description, kind: str) -> set[str]:
    layers = set()
    for name, found in description.kinds.items():
        if found == kind and name.endswith(".weight"):
            layers.add(name.removesuffix(".weight"))
    return layers


def _role(part: Part) -> str:
    return "vision" if part.target.in_vision else part.target.role


def _held_rows(row: Weight, split: Split) -> torch.Tensor:
    """Rows of the stored weight that the rank holds, ascending."""
    return torch.cat([_held_rows_of(part, row, split) for part in row.parts]).sort().values


def _held_rows_of(part: Part, row: Weight, split: Split) -> torch.Tensor:
    """Of a part, which is in q, k or v, say; its rows may be in another order there."""
    order = torch.arange(*(part.take or (0, row.shape[0])))
    if part.transform is not None:
        order = part.transform(order)
    first = part.at[0] if part.at else 0
    places = torch.arange(first, first + len(order))
    held = torch.zeros(len(order), dtype=torch.bool)
    for start, end in split.row_blocks(_role(part)):
        held |= (places >= start) & (places < end)
    return order[held]
