"""Tensor parallelism as pure arithmetic: which part of a decoder each of `size` devices holds.

qkv, up and lm_head are split by rows (outputs), out and down by columns (inputs), so that one sum over the devices after
out and one after down make every layer whole; their biases are in the first device's sum only (a quant_bias, which static
int8 layers must have, is zero on the others). Embedding and norms are held by all. Devices beyond the number of key/value
heads share one: each holds a copy of the head its queries use.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

import torch

from models.checkpoint.quantized import SCALARS
from models.checkpoint.table import Part, Target, Weight
from models.config import DecoderConfig
from runtime.common.errors import ToolkitError

SIZES = (1, 2, 4, 8)
ROWS = ("qkv", "up", "lm_head")
COLUMNS = ("out", "down")


def check_split(family, size: int):
    """ToolkitError when the family's decoder cannot be split over `size` devices."""
    c = family.decoder
    counts = {
        "attention heads": c.heads,
        "feed-forward channels": c.ffn,
        "vocabulary rows": c.vocab_size,
    }
    wrong = [f"{n} {what}" for what, n in counts.items() if n % size]
    if c.kv_heads % size and size % c.kv_heads:
        wrong.append(f"{c.kv_heads} key/value heads")
    if wrong:
        fitting = [str(s) for s in SIZES if not _misfit(c, s)]
        raise ToolkitError(
            f"--tensor-parallel-size {size} does not divide {family.name}'s {', '.join(wrong)}; use "
            f"{', '.join(fitting)}"
        )


def _misfit(c: DecoderConfig, size: int) -> bool:
    return bool(
        c.heads % size
        or c.ffn % size
        or c.vocab_size % size
        or (c.kv_heads % size and size % c.kv_heads)
    )


@dataclass(frozen=True)
class Split:
    """The part of `rank` when `whole` is split over `size` devices."""

    whole: DecoderConfig
    size: int = 1
    rank: int = 0

    @property
    def config(self) -> DecoderConfig:
        """The decoder that this device computes."""
        c = self.whole
        return replace(
            c,
            heads=c.heads // self.size,
            kv_heads=max(1, c.kv_heads // self.size),
            ffn=c.ffn // self.size,
        )

    def share(self, target: Target) -> Fraction:
        """The fraction of a weight that the first device, which has the most, holds."""
        role = target.role
        if role == "qkv":
            c = self.whole
            local = self.config
            return Fraction(local.heads + 2 * local.kv_heads, c.heads + 2 * c.kv_heads)
        split = role in ROWS or (role in COLUMNS and target.tensor.endswith("weight"))
        return Fraction(1, self.size if split else 1)

    def weights(self, table: Iterable[Weight]) -> Iterator[Weight]:
        """The weight table with every part narrowed to what this device holds."""
        for weight in table:
            yield (
                weight
                if self.size == 1
                else replace(
                    weight,
                    parts=tuple(
                        piece for part in weight.parts for piece in self._pieces(weight, part)
                    ),
                )
            )

    def _pieces(self, weight: Weight, part: Part) -> list[Part]:
        role = part.target.role
        if part.target.in_vision or role not in (*ROWS, *COLUMNS):
            return [part]
        if role in COLUMNS:
            return self._columns(weight, part)
        blocks = self.row_blocks(role)
        if part.target.is_piece:
            return [_rows_of_piece(part, blocks)]
        return self._rows(weight, part, blocks)

    def _columns(self, weight, part) -> list[Part]:
        tensor = part.target.tensor
        if tensor == "weight":
            span = slice(*self.span(weight.shape[1]))
            return [replace(part, transform=_then(part.transform, lambda rows: rows[:, span]))]
        if self.rank and tensor == "quant_bias":  # a static layer must have one
            return [replace(part, transform=torch.zeros_like)]
        return [part] * (self.rank == 0 or tensor != "bias")

    def _rows(self, weight, part, blocks) -> list[Part]:
        """Parts of one source whose rows fall into `blocks`, the row ranges of the whole target that are wanted."""
        first, total = part.at or (0, weight.shape[0])
        source, last = part.take or (0, weight.shape[0])
        ends = list(accumulate(b - a for a, b in blocks))
        wanted = [
            (max(a, first), min(b, first + last - source), end - b)
            for (a, b), end in zip(blocks, ends)
        ]
        wanted = [(a, b, shift) for a, b, shift in wanted if a < b]
        if (
            part.transform and len(wanted) > 1
        ):  # it may move rows between q, k and v: read all of them first
            return [
                replace(
                    part,
                    at=None,
                    transform=_then(
                        part.transform, lambda rows: torch.cat([rows[a:b] for a, b, _ in wanted])
                    ),
                )
            ]
        return [
            replace(part, take=(source + a - first, source + b - first), at=(a + shift, ends[-1]))
            for a, b, shift in wanted
        ]

    def row_blocks(self, role: str) -> list[tuple[int, int]]:
        """Row ranges [first, last) of the whole `role` (one of ROWS) that this device holds."""
        c = self.whole
        if role == "lm_head":
            return [self.span(c.vocab_size)]
        if role == "up":
            halves = 2 if c.activation == "swiglu" else 1
            return [
                (i * c.ffn + a, i * c.ffn + b) for i in range(halves) for a, b in [self.span(c.ffn)]
            ]
        q = self.span(c.heads)
        kv = self._kv_span()
        dim = c.head_dim
        return [
            ((start + a) * dim, (start + b) * dim)
            for start, (a, b) in ((0, q), (c.heads, kv), (c.heads + c.kv_heads, kv))
        ]

    def span(self, count: int) -> tuple[int, int]:
        each = count // self.size
        return self.rank * each, (self.rank + 1) * each

    def _kv_span(self) -> tuple[int, int]:
        if self.whole.kv_heads >= self.size:
            return self.span(self.whole.kv_heads)
        head = self.rank * self.whole.kv_heads // self.size
        return head, head + 1


def _rows_of_piece(part: Part, blocks) -> Part:
    """The rows of a quantised layer's piece that lie in `blocks`, ranges of the whole layer's rows.

    Here it begins behind those rows of the pieces before it that lie in `blocks` too.
    """
    first = part.target.first_row
    rows_before = sum(max(0, min(b, first) - a) for a, b in blocks)
    part = replace(part, target=replace(part.target, first_row=rows_before))
    if part.target.tensor in SCALARS:
        return part
    ranges = [(max(a - first, 0), b - first) for a, b in blocks if b > first]

    def held(rows):
        return torch.cat([rows[a:b] for a, b in ranges])

    return replace(part, transform=_then(part.transform, held))


def _then(first: Callable | None, second: Callable) -> Callable:
    return second if first is None else lambda rows: second(first(rows))
