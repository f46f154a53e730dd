"""Weights in the order in which the CPU's own kernels read them.

Takes a weight that oneDNN packed (bfloat16, int8), or 4-bit values with their scales; returns
where the values lie and how. Nothing is copied of what oneDNN packed: one copy serves its matmuls
of many tokens and ours of few.
"""

import ctypes
from dataclasses import dataclass

import torch

from .native_library import kernels

GROUP = 128  # values of a row that share one scale and zero in int4
BYTES_TOGETHER = 4  # of a row of the weight, side by side in a block
BLOCK_SIZES = (64, 48, 32, 16)  # rows of the weight in one of oneDNN's blocks
WORD_SHIFTS = (0, 16, 4, 20)  # bits by which the four pairs of values lie in an int32 word
TILE = 16  # rows of the weight that the int4 kernel computes together
ROWS_AT_A_TIME = 1024  # of a weight that is brought into the kernels' order


@dataclass
class Blocks:
    """A weight [n, k] in oneDNN's blocks: [n / block, rounded up][k / each][block][each], where
    `each` values of k are BYTES_TOGETHER bytes."""

    address: int
    n: int
    k: int
    block: int


def find_blocks(packed: torch.Tensor, weight: torch.Tensor) -> Blocks | None:
    """Where oneDNN put `weight` [n, k], bfloat16 or int8.

    None when it lies in another order than the kernels read, or there are no kernels.
    """
    n, k = weight.shape
    if not packed.is_mkldnn or kernels() is None or n % TILE or k % 16:
        return None
    address = torch.ops.mkldnn.data_ptr(packed)
    size = torch.ops.mkldnn._nbytes(packed)
    raw = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=weight.dtype)
    for block in BLOCK_SIZES:
        if same_layout(raw, weight, block):
            return Blocks(address, n, k, block)
    return None


def same_layout(raw: torch.Tensor, weight: torch.Tensor, block: int) -> bool:
    """Does oneDNN's memory `raw` [values] hold `weight` [n, k] in blocks of `block` rows?

    The first and the last block show it.
    """
    n, k = weight.shape
    each = BYTES_TOGETHER // weight.element_size()
    values = block * k  # of one block
    count = -(-n // block)
    if len(raw) < count * values:
        return False
    for index in (0, count - 1):
        rows = weight[index * block : (index + 1) * block]
        expected = rows.unflatten(1, (-1, each)).transpose(0, 1)
        stored = raw[index * values : (index + 1) * values].view(k // each, block, each)
        if not torch.equal(stored[:, : len(rows)], expected):
            return False
    return True


class Int4Blocks:
    """4-bit weights [n, k] as the kernels read them, one line of memory (64 bytes) after another.

    Of 16 rows and a group of 128 values there are 16 lines of words, and one of scales and zeros.
    A word (int32) is 8 values of a row; word s has the pairs of values s, 16 + s (lower nibbles of
    its four bytes), 32 + s, 48 + s (upper ones).
    """

    block = TILE

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """As packed_weights.Int4Weight takes them: q uint8 [n, k / 2], scales bfloat16
        [k / 128, n, 2]."""
        self.n = len(q)
        self.k = 2 * q.shape[1]
        lines = []
        for rows, own in zip(q.split(ROWS_AT_A_TIME), scales.split(ROWS_AT_A_TIME, 1)):
            lines.append(torch.cat((_words(rows), _scale_lines(own)), 2))
        self._lines = torch.cat(lines)
        self.address = self._lines.data_ptr()

    def floats(self, start: int, end: int) -> torch.Tensor:
        """Rows start..end, multiples of 16, in bfloat16 [end - start, k]."""
        out = torch.empty(end - start, self.k, dtype=torch.bfloat16)
        lines = self._lines[start // TILE]
        kernels().floats_int4(lines.data_ptr(), out.data_ptr(), end - start, self.k)
        return out


def _words(q: torch.Tensor) -> torch.Tensor:
    """uint8 [n, k / 2] -> int32 [n / 16, k / 128, 16 words, 16 rows]."""
    pairs = q.view(len(q), -1, 4, 16).int()
    words = torch.zeros_like(pairs[:, :, 0])
    for index, shift in enumerate(WORD_SHIFTS):
        pair = pairs[:, :, index]
        words |= (pair & 15) << shift | pair >> 4 << shift + 8
    return words.unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def _scale_lines(scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [k / 128, n, 2] -> their bits as int32 [n / 16, k / 128, 1, 16]: in each line 16
    scales, then 16 zeros."""
    tiles = scales.unflatten(1, (-1, TILE)).permute(1, 0, 3, 2).contiguous()
    return tiles.view(torch.int32).flatten(2).unsqueeze(2)
