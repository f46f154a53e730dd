"""Tensor parallelism as pure arithmetic: which part of a decoder each of `size` devices holds.

qkv, up and lm_head are split by rows (outputs), out and down by columns (inputs). One sum over the
devices after out and one after down then make every layer whole; the biases of these two are held
by the first device only (a quant_bias, which static int8 layers must have, is zero on the others).
Embedding and norms are held by all. Devices beyond the number of key/value heads share one: each
holds a copy of the head that its queries use. A vocabulary that does not divide, as that of a
fine-tuned checkpoint with added tokens, is filled up on the last device with rows of zeros, whose
logits the decoder cuts off.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch.nn import functional as F

from models.checkpoint.quantized import SCALARS
from models.checkpoint.table import Part, Target, Weight
from models.config import DecoderConfig
from runtime.common.errors import ToolkitError

SIZES = (1, 2, 4, 8)
ROWS = ("qkv", "up", "lm_head")
COLUMNS = ("out", "down")


class Interval(NamedTuple):
    """Rows [start, end)."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return max(self.end - self.start, 0)

    def shifted(self, by: int) -> "Interval":
        return Interval(self.start + by, self.end + by)

    def scaled(self, by: int) -> "Interval":
        return Interval(self.start * by, self.end * by)

    def intersection(self, other: "Interval") -> "Interval":
        """What both hold; of size 0 when they do not overlap."""
        return Interval(max(self.start, other.start), min(self.end, other.end))


def check_split(family, size: int):
    """ToolkitError when the family's decoder cannot be split over `size` devices."""
    wrong = _undivided(family.decoder, size)
    if wrong:
        fitting = [str(s) for s in SIZES if not _undivided(family.decoder, s)]
        raise ToolkitError(
            f"--tensor-parallel-size {size} does not divide {family.name}'s {', '.join(wrong)}; use "
            f"{', '.join(fitting)}"
        )


def padded_vocabulary(c: DecoderConfig, size: int) -> int:
    """Rows of lm_head on all `size` devices together: the vocabulary, or the next multiple."""
    return -(-c.vocab_size // size) * size


def _undivided(c: DecoderConfig, size: int) -> list[str]:
    """What of a decoder `size` devices cannot share evenly, e.g. ["6 attention heads"]."""
    counts = {"attention heads": c.heads, "feed-forward channels": c.ffn}
    wrong = [f"{count} {what}" for what, count in counts.items() if count % size]
    if padded_vocabulary(c, size) - c.vocab_size >= padded_vocabulary(c, size) // size:
        wrong.append(f"{c.vocab_size} vocabulary rows")  # none would be left for the last device
    if c.kv_heads % size and size % c.kv_heads:
        wrong.append(f"{c.kv_heads} key/value heads")
    return wrong


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
        if role == "lm_head":
            rows = padded_vocabulary(self.whole, self.size) // self.size
            return Fraction(rows, self.whole.vocab_size)
        split = role in ROWS or (role in COLUMNS and target.tensor.endswith("weight"))
        return Fraction(1, self.size if split else 1)

    def weights(self, table: Iterable[Weight]) -> Iterator[Weight]:
        """The weight table with every part narrowed to what this device holds."""
        for weight in table:
            yield weight if self.size == 1 else self._narrowed(weight)

    def _narrowed(self, weight: Weight) -> Weight:
        parts = []
        for part in weight.parts:
            parts += self._pieces(weight, part)
        return replace(weight, parts=tuple(parts))

    def _pieces(self, weight: Weight, part: Part) -> list[Part]:
        role = part.target.role
        if part.target.in_vision or role not in (*ROWS, *COLUMNS):
            return [part]
        if role in COLUMNS:
            return self._columns(weight, part)
        blocks = self.row_blocks(role)
        if part.target.is_piece:
            return [_rows_of_piece(part, blocks)]
        pieces = self._rows(weight, part, blocks)
        if role == "lm_head":
            return [self._filled_up(piece) for piece in pieces]
        return pieces

    def _filled_up(self, part: Part) -> Part:
        """A part of lm_head with the rows of zeros that the last device needs."""
        first, end = part.at
        rows = padded_vocabulary(self.whole, self.size) // self.size
        if end == rows:
            return part
        fill = _then(part.transform, lambda held: F.pad(held, (0, 0, 0, rows - end)))
        return replace(part, at=(first, rows), transform=fill)

    def _columns(self, weight: Weight, part: Part) -> list[Part]:
        tensor = part.target.tensor
        if tensor == "weight":
            columns = slice(*self.span(weight.shape[1]))
            return [replace(part, transform=_then(part.transform, lambda rows: rows[:, columns]))]
        if self.rank and tensor == "quant_bias":  # a static layer must have one
            return [replace(part, transform=torch.zeros_like)]
        if self.rank and tensor == "bias":
            return []
        return [part]

    def _rows(self, weight: Weight, part: Part, blocks: list[Interval]) -> list[Part]:
        """The rows of one part that lie in `blocks`, the rows of the whole target that this device
        holds.

        Rows are counted three ways: in the source tensor, in the whole target, and in this device's
        target, where `blocks` lie one after another.
        """
        source = Interval(*(part.take or (0, weight.shape[0])))
        first = part.at[0] if part.at else 0
        target = source.shifted(first - source.start)
        held = []  # (rows of the whole target, from there to this device's target)
        end = 0
        for block in blocks:
            rows = block.intersection(target)
            if rows.size:
                held.append((rows, end - block.start))
            end += block.size
        if part.transform and len(held) > 1:
            return [_transformed_whole(part, [rows for rows, _ in held])]
        return [
            replace(
                part,
                take=tuple(rows.shifted(source.start - first)),
                at=(rows.start + to_local, end),
            )
            for rows, to_local in held
        ]

    def row_blocks(self, role: str) -> list[Interval]:
        """Row ranges of the whole `role` (one of ROWS) that this device holds."""
        c = self.whole
        if role == "lm_head":
            rows = self.span(padded_vocabulary(c, self.size))
            return [rows.intersection(Interval(0, c.vocab_size))]
        if role == "up":
            half = self.span(c.ffn)
            return [half, half.shifted(c.ffn)] if c.activation == "swiglu" else [half]
        kv = self._kv_span()
        heads = [self.span(c.heads), kv.shifted(c.heads), kv.shifted(c.heads + c.kv_heads)]
        return [each.scaled(c.head_dim) for each in heads]

    def span(self, count: int) -> Interval:
        """This device's share of `count` things that are dealt out evenly."""
        each = count // self.size
        return Interval(self.rank * each, (self.rank + 1) * each)

    def _kv_span(self) -> Interval:
        if self.whole.kv_heads >= self.size:
            return self.span(self.whole.kv_heads)
        head = self.rank * self.whole.kv_heads // self.size
        return Interval(head, head + 1)


def _transformed_whole(part: Part, held: list[Interval]) -> Part:
    """A transform may move rows between q, k and v: it needs all of them, then some are kept."""
    return replace(part, at=None, transform=_then(part.transform, _keeping(held)))


def _rows_of_piece(part: Part, blocks: list[Interval]) -> Part:
    """The rows of a quantised layer's piece that lie in `blocks`, ranges of the whole layer's rows.

    Here it begins behind those rows of the pieces before it that lie in `blocks` too.
    """
    first = part.target.first_row
    before = Interval(0, first)
    rows_before = sum(block.intersection(before).size for block in blocks)
    part = replace(part, target=replace(part.target, first_row=rows_before))
    if part.target.tensor in SCALARS:
        return part
    held = [Interval(max(a - first, 0), b - first) for a, b in blocks if b > first]
    return replace(part, transform=_then(part.transform, _keeping(held)))


def _keeping(intervals: list[Interval]) -> Callable:
    return lambda rows: torch.cat([rows[each.start : each.end] for each in intervals])


def _then(first: Callable | None, second: Callable) -> Callable:
    return second if first is None else lambda rows: second(first(rows))
