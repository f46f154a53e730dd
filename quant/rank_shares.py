"""The part of a checkpoint that each rank of a tensor-parallel run holds, under the checkpoint's own names and in its order
of rows: what MindIE reads compressed (W8A8SC) weights from, one folder partR-of-N per rank.

Which rows and columns those are is the runtime's rule (runtime/parallel/split.py); here it is applied to stored tensors.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from models.checkpoint.quantized import SCALARS, STATIC, Description
from models.checkpoint.reader import SHOWN, Checkpoint
from models.checkpoint.table import Part, Weight
from models.errors import ModelError
from runtime.parallel.split import COLUMNS, ROWS, Split

NAME = re.compile(r"part(\d+)-of-(\d+)")


def part_name(rank: int, size: int) -> str:
    return f"part{rank}-of-{size}"


def part_folders(folder: Path) -> dict[tuple[int, int], Path]:
    """{(rank, size): folder} in `folder`, of however many splits."""
    return {
        (int(match[1]), int(match[2])): file
        for file in folder.glob("part*")
        if (match := NAME.fullmatch(file.name))
    }


def find_parts(folder: Path) -> list[Path]:
    """The folders part0-of-N ... of `folder`, by rank; ModelError if one is missing or they are of two splits."""
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
    """rows, columns: those of the whole tensor that the rank holds, None for all. zero: another rank's sum has it."""

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
        tensor = tensor if self.rows is None else tensor[self.rows]
        tensor = tensor if self.columns is None else tensor[:, self.columns]
        return torch.zeros_like(tensor) if self.zero else tensor


class Shares:
    """Shares of the tensors of a family's checkpoint, float or quantised."""

    def __init__(self, family, split: Split):
        self._split = split
        self._rows = {row.source: row for row in family.weights()}

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
            return (
                Share(columns=slice(*self._split.span(row.shape[1])))
                if tensor == "weight"
                else Share(zero=self._split.rank > 0 and tensor in ("bias", "quant_bias"))
            )
        return Share()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the float checkpoint's tensors that must be there."""
        return {
            name: self.of(name).shape(row.shape)
            for name, row in self._rows.items()
            if not row.optional
        }


def check_parts(family, description: Description, checkpoint: Checkpoint, split: Split):
    """ModelError unless `checkpoint` holds every tensor of the rank under its name, and in its shape where it has one."""
    expected = Shares(family, split).shapes()
    compressed = _layers_of_kind(description, "W8A8SC")
    in_quant_bias = {
        f"{layer}.bias"
        for kind in ("W8A8SC", *STATIC)
        for layer in _layers_of_kind(description, kind)
    }
    layers = {name.rpartition(".")[0] for name in expected}
    wrong = [
        f"{name} is missing"
        for name in sorted(expected.keys() - set(checkpoint.names) - in_quant_bias)
    ]
    wrong += [
        f"{name} belongs to no layer"
        for name in checkpoint.names
        if name.rpartition(".")[0].removesuffix(".module") not in layers
    ]
    wrong += [
        f"{name} is {list(shape)}, not {list(expected[name])}"
        for name, shape in checkpoint.shapes.items()
        if name in expected
        and shape != expected[name]
        and name.removesuffix(".weight") not in compressed
    ]
    for layer in sorted(compressed & layers):
        if f"{layer}.info" in checkpoint.names and (
            found := checkpoint.tensor(f"{layer}.info").tolist()[3:1:-1]
        ) != list(expected[f"{layer}.weight"]):
            wrong.append(
                f"{layer}.info is of a weight {found}, not {list(expected[layer + '.weight'])}"
            )
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors of {checkpoint.directory} do not fit config.json: {'; '.join(wrong[:SHOWN])}"
        )


def _layers_of_kind(description: Description, kind: str) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, found in description.kinds.items()
        if found == kind and name.endswith(".weight")
    }


def _role(part: Part) -> str:
    return "vision" if part.target.in_vision else part.target.role


def _held_rows(row: Weight, split: Split) -> torch.Tensor:
    """Of the stored weight: rows may go to q, k and v, and stand there in another order."""
    held = []
    for part in row.parts:
        order = torch.arange(*(part.take or (0, row.shape[0])))
        order = order if part.transform is None else part.transform(order)
        first = part.at[0] if part.at else 0
        places = torch.arange(first, first + len(order))
        wanted = torch.zeros(len(order), dtype=torch.bool)
        for start, end in split.row_blocks(_role(part)):
            wanted |= (places >= start) & (places < end)
        held.append(order[wanted])
    return torch.cat(held).sort().values
