"""Packed weight classes for the CPU; an instance replaces `Linear.weight`. Float, int8 and int4.

Each takes a float weight [n, k], or what --cpu-weights stored of it, and computes x [T, k] ->
[T, n]: a small batch in bfloat16 with our own kernels (native.py), all others with torch's.

int8: one scale per output row; activations are rounded to 8 bits with one scale per token, sums
are exact integers (W8A8 dynamic; oneDNN). int4: scale and zero per row and group of 128 inputs,
activations in bfloat16; for a large batch some rows of the weight at a time are made bfloat16.
`tensors` of a packed weight are what is stored of it, the same on every machine; `from_tensors`
packs them for this one.
"""

import sys

import torch
from torch.nn import functional as F

from models.network.linear import Linear

from . import native
from .native_blocks import GROUP, Int4Blocks, find_blocks
from .native_library import kernels

PACKED_ROWS = 4096  # of a weight rounded or packed at a time: heads are large
FLOAT_ROWS = 1024  # of an int4 weight that are made bfloat16 at a time
OWN_LARGE_BATCH = 4 * native.SMALL_BATCH  # tokens from which making int4 bfloat16 is quicker
TORCH_LARGE_BATCH = 64  # the same for torch's kernel, measured: as quick at 56
# rows that torch interleaves: row j in the low bits, j + half of them in the high ones
INTERLEAVED_ROWS = {"AVX512": 64, "AVX2": 32}
SMALLEST = 1e-20  # largest value of a token whose values are all zero


class SmallBatchWeight:
    """A packed weight whose matmuls of a small batch may be native.py's."""

    _blocks = None  # where the kernels find its values; None: torch computes everything
    _matmul = None
    _matmul_bias = None  # the one that _matmul was made with

    def small_batch_matmul(self, bias=None) -> native.Matmul | None:
        """The kernels' matmul with the layer's bias, made once; None where torch computes it."""
        if self._blocks and (self._matmul is None or self._matmul_bias is not bias):
            self._matmul = self._make_matmul(bias)
            self._matmul_bias = bias
        return self._matmul

    def _make_matmul(self, bias) -> native.Matmul:
        raise NotImplementedError


class FloatWeight(SmallBatchWeight):
    """weight bfloat16 or float32 [n, k], in oneDNN's blocks.

    Same arithmetic as the plain layout at about 1.5 times its bandwidth with one token.
    """

    def __init__(self, weight: torch.Tensor):
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        if weight.dtype == torch.bfloat16:
            self._blocks = find_blocks(self._packed, weight)

    def __call__(self, x, bias):
        """x [T, k] -> [T, n] in its dtype."""
        if self._blocks and native.is_small_batch(x):
            return self.small_batch_matmul(bias)(x)
        return torch.ops.mkldnn._linear_pointwise(
            x,
            self._packed,
            bias,
            "none",
            [],
            "",
        )

    def _make_matmul(self, bias):
        return native.Matmul(native.BF16, self._blocks, bias)


class Int8Rows(SmallBatchWeight):
    """int8 weight [n, k] * scale float32 [n], for oneDNN's matmuls and those of native.py.

    Activations are uint8 around a zero point: oneDNN has no fast kernel for int8.
    """

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        self._scale = scale.clone()  # a view would keep its file's q in memory, too
        self._zeros = torch.zeros(len(scale), dtype=torch.int32)
        self._rest = row_sums(q) * -native.ZERO
        self._packed = torch.ops.onednn.qlinear_prepack(q, None)
        self._blocks = find_blocks(self._packed, q)

    def _make_matmul(self, bias, *fixed):
        return native.Matmul(
            native.INT8,
            self._blocks,
            bias,
            self._rest,
            self._scale,
            *fixed,
        )

    def matmul(self, q, zero_point: int, bias, out: torch.dtype):
        """q uint8 [m, k] -> (q - zero_point) @ weight.T * scale + bias as `out` [m, n]."""
        return torch.ops.onednn.qlinear_pointwise(
            q,
            1.0,
            zero_point,
            self._packed,
            self._scale,
            self._zeros,
            bias,
            1.0,
            0,
            out,
            "none",
            [],
            "",
        )


class Int8Weight(Int8Rows):
    """weight about int8 [n, k] * scale float32 [n]."""

    # without VNNI oneDNN adds pairs of products in 16 bits: 7 bits of activations keep them from
    # saturating
    _levels = 127 if torch.cpu._is_vnni_supported() else 63

    @staticmethod
    def tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [n, k] -> what is stored: int8 [n, k], scale float32 [n]."""
        scale = weight.abs().amax(1).float().clamp_(min=SMALLEST) / 127
        rows = []
        for part, own in zip(weight.split(PACKED_ROWS), scale.split(PACKED_ROWS)):
            rows.append((part.float() / own[:, None]).round_().to(torch.int8))
        return {"int8": torch.cat(rows), "scale": scale}

    @classmethod
    def from_tensors(cls, stored: dict):
        return cls(stored["int8"], stored["scale"])

    def __call__(self, x, bias):
        """x [T, k] -> [T, n] in its dtype."""
        if self._blocks and native.is_small_batch(x):
            return self.small_batch_matmul(bias)(x)
        q, token_scale = self._round(x)
        out = torch.float32 if x.dtype == torch.float16 else x.dtype
        y = self.matmul(q, self._levels + 1, None, out).mul_(token_scale.to(out))
        if bias is not None:
            y = y.add_(bias)
        return y.to(x.dtype)

    def _round(self, x):
        """x [T, k] -> (uint8 [T, k] around _levels + 1, scale of each token float32 [T, 1])."""
        if native.kernels_support(x):
            return native.round_activations(x)
        largest = x.abs().amax(-1, keepdim=True).float()
        scale = largest.clamp_(min=SMALLEST).div_(self._levels)
        shifted = x.to(torch.float32, copy=True).div_(scale).add_(self._levels + 1.5)
        return shifted.to(torch.uint8), scale  # the half rounds


class Int4Weight(SmallBatchWeight):
    """weight about (q - 8) * scale + zero, q in 0..15 [n, k], scale and zero per row and group."""

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """q uint8 [n, k / 2], two values each, the first in the low bits; scales bfloat16
        [k / GROUP, n, 2]: scale and zero."""
        if kernels():
            self._blocks = Int4Blocks(q, scales)
            self._form = self._blocks
            self._large_batch = OWN_LARGE_BATCH
        else:
            self._form = TorchInt4(q, scales)
            self._large_batch = self._form.large_batch

    def _make_matmul(self, bias):
        return native.Matmul(native.INT4, self._blocks, bias)

    @staticmethod
    def fits(shape: tuple[int, int]) -> bool:
        n, k = shape
        return n % 16 == 0 and k % GROUP == 0

    @staticmethod
    def tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [n, k] -> what is stored: int4 uint8 [n, k / 2], scales [k / GROUP, n, 2]."""
        q, scales = zip(*map(_rounded_to_4_bits, weight.split(PACKED_ROWS)))
        return {"int4": torch.cat(q), "scales": torch.cat(scales, 1)}

    @classmethod
    def from_tensors(cls, stored: dict):
        return cls(stored["int4"], stored["scales"])

    def __call__(self, x, bias):
        """x [T, k] -> [T, n] in its dtype."""
        rows = x.bfloat16().contiguous()
        if len(x) >= self._large_batch:
            y = self._float_matmul(rows)
        elif self._blocks:
            return self._small_batches(rows, bias).to(x.dtype)
        else:
            y = self._form.linear(rows)
        y = y.to(x.dtype)
        return y if bias is None else y.add_(bias)

    def _float_matmul(self, x):
        """With FLOAT_ROWS of the weight at a time in bfloat16."""
        n = self._form.n
        y = x.new_empty(len(x), n)
        for start, out in zip(range(0, n, FLOAT_ROWS), y.split(FLOAT_ROWS, 1)):
            out.copy_(F.linear(x, self._form.floats(start, start + out.shape[1])))
        return y

    def _small_batches(self, x, bias):
        """With the kernels, SMALL_BATCH tokens at a time; the bias is in it."""
        matmul = self.small_batch_matmul(bias)
        return torch.cat([matmul(batch) for batch in x.split(native.SMALL_BATCH)])


class TorchInt4:
    """4-bit weights as torch's own kernel reads them.

    From `large_batch` tokens on it loses to making them bfloat16.
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """As Int4Weight takes them."""
        self.n = len(q)
        self._scales = scales.clone()  # a view would keep its file's q in memory, too
        self._block = INTERLEAVED_ROWS.get(torch.backends.cpu.get_cpu_capability())
        self.large_batch = sys.maxsize
        if self._block and self.n % self._block == 0:
            self.large_batch = TORCH_LARGE_BATCH
        packed = []
        for rows in q.split(PACKED_ROWS):
            values = torch.stack((rows & 15, rows >> 4), -1).flatten(1).int()
            packed.append(torch._convert_weight_to_int4pack_for_cpu(values, 1))
        self._packed = torch.cat(packed)

    def linear(self, x):
        """bfloat16 [m, k] -> [m, n]."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, GROUP, self._scales)

    def floats(self, start: int, end: int) -> torch.Tensor:
        """Rows start..end in bfloat16 [end - start, k]."""
        packed = self._packed[start:end]
        scale, zero = self._scales[:, None, start:end].unbind(-1)
        rows = len(packed)
        k = 2 * packed.shape[1]
        blocks = packed.view(-1, k, self._block // 2).transpose(0, 1).contiguous()
        nibbles = torch.stack((blocks & 15, blocks >> 4), 2)
        q = nibbles.view(torch.int8).sub_(8).bfloat16().view(-1, GROUP, rows)
        return torch.addcmul(zero.contiguous(), q, scale.contiguous()).view(k, rows).t()


def row_sums(weight):
    """int8 [n, k] -> int32 [n]; ten times as fast as `sum`."""
    return torch._int_mm(weight, weight.new_ones(weight.shape[1], 1))[:, 0]


def small_batch_matmul_of(layer) -> native.Matmul | None:
    """native.py's matmul of a Linear or a packed layer; None where torch computes it."""
    if isinstance(layer, Linear):
        weight = layer.weight
        bias = layer.bias
    else:
        weight = layer
        bias = None
    return weight.small_batch_matmul(bias) if isinstance(weight, SmallBatchWeight) else None


def _rounded_to_4_bits(weight):
    """Rows [n, k] -> q and scales as Int4Weight takes them."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1)
    high = groups.amax(-1)
    scale = ((high - low) / 15).clamp_(min=SMALLEST).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    steps = (groups - zero.float()[..., None]).div_(scale.float()[..., None])
    q = steps.round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)
    pairs = q[:, ::2] | q[:, 1::2] << 4
    return pairs, torch.stack((scale, zero), -1).transpose(0, 1).contiguous()
