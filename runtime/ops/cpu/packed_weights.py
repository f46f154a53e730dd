"""Linear weights packed for the CPU, each stands in `Linear.weight`: float ones as they are, and 8 or 4 bits made from float
ones (--cpu-weights). Products of a few rows in bfloat16 are native.py's, all others torch's.

int8: one scale per output row; activations are rounded to 8 bits with one scale per token, sums are exact integers
(W8A8 dynamic; oneDNN). int4: scale and zero per row and group of 128 inputs, activations in bfloat16; for many tokens a
piece of the weight at a time is made bfloat16. `tensors` of a packed weight are what is stored of it, the same on every
machine; `from_tensors` packs them for this one.
"""

import sys

import torch
from torch.nn import functional as F

from models.network.linear import Linear

from . import native

GROUP = 128
ROWS = 4096  # of a weight rounded or packed at a time: heads are large
PIECE = 1024  # rows of it that are made bfloat16 at a time, for `many` tokens
MANY = 64  # measured for torch's kernel: as quick at 56
BLOCK = {
    "AVX512": 64,
    "AVX2": 32,
}  # rows that torch interleaves: row j in the low bits, j + BLOCK / 2 in the high ones
SMALLEST = 1e-20  # largest value of a token whose values are all zero


class Few:
    """A packed weight whose products of a few tokens may be native.py's."""

    _blocks = _made = _made_with = None

    def few(self, bias=None) -> native.Product | None:
        """The product with the layer's bias; made once."""
        if self._blocks and (self._made is None or self._made_with is not bias):
            self._made = self._product(bias)
            self._made_with = bias
        return self._made


class FloatWeight(Few):
    """weight bfloat16 or float32 [n, k]; about 1.5 times the bandwidth of the plain layout at one row, same arithmetic."""

    def __init__(self, weight: torch.Tensor):
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._blocks = (
            native.blocks_of(self._packed, weight) if weight.dtype == torch.bfloat16 else None
        )

    def __call__(self, x, bias):
        if self._blocks and native.suits(x):
            return self.few(bias)(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")

    def _product(self, bias):
        return native.Product(native.BF16, self._blocks, bias)


class Int8Rows(Few):
    """int8 weight [n, k] * scale float32 [n], for oneDNN's products and those of native.py.

    Activations are uint8 around a zero point: oneDNN has no fast kernel for int8.
    """

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        self._scale = scale.clone()  # a view would keep its file's q in memory, too
        self._zeros = torch.zeros(len(scale), dtype=torch.int32)
        self._rest = row_sums(q) * -native.ZERO
        self._packed = torch.ops.onednn.qlinear_prepack(q, None)
        self._blocks = native.blocks_of(self._packed, q)

    def _product(self, bias, *fixed):
        return native.Product(native.INT8, self._blocks, bias, self._rest, self._scale, *fixed)

    def product(self, q, zero_point: int, bias, out: torch.dtype):
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

    # without VNNI oneDNN adds pairs of products in 16 bits: 7 bits of activations keep them from saturating
    _levels = 127 if torch.cpu._is_vnni_supported() else 63

    @staticmethod
    def tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1).float().clamp_(min=SMALLEST) / 127
        rows = [
            (part.float() / of[:, None]).round_().to(torch.int8)
            for part, of in zip(weight.split(ROWS), scale.split(ROWS))
        ]
        return {"int8": torch.cat(rows), "scale": scale}

    @classmethod
    def from_tensors(cls, stored: dict):
        return cls(stored["int8"], stored["scale"])

    def __call__(self, x, bias):
        """x [T, k] -> [T, n] in its dtype."""
        if self._blocks and native.suits(x):
            return self.few(bias)(x)
        q, token_scale = (native.rounded if native.suits(x, native.ANY) else self._rounded)(x)
        out = torch.float32 if x.dtype == torch.float16 else x.dtype
        y = self.product(q, self._levels + 1, None, out).mul_(token_scale.to(out))
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    def _rounded(self, x):
        scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=SMALLEST).div_(self._levels)
        return x.to(torch.float32, copy=True).div_(scale).add_(self._levels + 1.5).to(
            torch.uint8
        ), scale  # the half rounds


class Int4Weight(Few):
    """weight about (q - 8) * scale + zero, q in 0..15 [n, k], scale and zero per row and group."""

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """q uint8 [n, k / 2], two values each, the first in the low bits; scales [k / GROUP, n, 2]."""
        self._blocks = native.Int4Blocks(q, scales) if native.kernels() else None
        self._form = self._blocks or TorchInt4(q, scales)

    def _product(self, bias):
        return native.Product(native.INT4, self._blocks, bias)

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        return weight.shape[0] % 16 == 0 and weight.shape[1] % GROUP == 0

    @staticmethod
    def tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        q, scales = zip(*map(_rounded_to_4_bits, weight.split(ROWS)))
        return {"int4": torch.cat(q), "scales": torch.cat(scales, 1)}

    @classmethod
    def from_tensors(cls, stored: dict):
        return cls(stored["int4"], stored["scales"])

    def __call__(self, x, bias):
        """x [T, k] -> [T, n] in its dtype."""
        rows = x.bfloat16().contiguous()
        if len(x) >= self._form.many:
            y = self._by_pieces(rows).to(x.dtype)
        elif self._blocks:
            return torch.cat([self.few(bias)(some) for some in rows.split(native.FEW)]).to(x.dtype)
        else:
            y = self._form.linear(rows).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def _by_pieces(self, x):
        y = x.new_empty(len(x), self._form.n)
        for start, out in zip(range(0, self._form.n, PIECE), y.split(PIECE, 1)):
            out.copy_(F.linear(x, self._form.floats(start, start + out.shape[1])))
        return y


class TorchInt4:
    """4-bit weights as torch's own kernel reads them. From `many` rows on it loses to making them bfloat16."""

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """As Int4Weight takes them."""
        self.n = len(q)
        self._scales = scales.clone()  # as above
        self._block = BLOCK.get(torch.backends.cpu.get_cpu_capability())
        self.many = MANY if self._block and self.n % self._block == 0 else sys.maxsize
        blocks = [
            torch.stack((rows & 15, rows >> 4), -1).flatten(1).int() for rows in q.split(ROWS)
        ]
        self._packed = torch.cat(
            [torch._convert_weight_to_int4pack_for_cpu(block, 1) for block in blocks]
        )

    def linear(self, x):
        """bfloat16 [m, k] -> [m, n]."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, GROUP, self._scales)

    def floats(self, start: int, end: int) -> torch.Tensor:
        """Rows start..end in bfloat16 [end - start, k]."""
        packed, (scale, zero) = self._packed[start:end], self._scales[:, None, start:end].unbind(-1)
        rows = len(packed)
        k = 2 * packed.shape[1]
        blocks = packed.view(-1, k, self._block // 2).transpose(0, 1).contiguous()
        q = (
            torch.stack((blocks & 15, blocks >> 4), 2)
            .view(torch.int8)
            .sub_(8)
            .bfloat16()
            .view(-1, GROUP, rows)
        )
        return torch.addcmul(zero.contiguous(), q, scale.contiguous()).view(k, rows).t()


def row_sums(weight):
    """int8 [n, k] -> int32 [n]; ten times as fast as `sum`."""
    return torch._int_mm(weight, weight.new_ones(weight.shape[1], 1))[:, 0]


def product_of(layer) -> native.Product | None:
    """native.py's product of a few tokens, of a Linear or a packed layer; None where torch computes it."""
    form, bias = (layer.weight, layer.bias) if isinstance(layer, Linear) else (layer, None)
    return form.few(bias) if isinstance(form, Few) else None


def _rounded_to_4_bits(weight):
    """Rows [n, k] -> q and scales as Int4Weight takes them."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1)
    high = groups.amax(-1)
    scale = ((high - low) / 15).clamp_(min=SMALLEST).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = (
        (groups - zero.float()[..., None])
        .div_(scale.float()[..., None])
        .round_()
        .add_(8)
        .clamp_(0, 15)
    )
    q = q.to(torch.uint8).flatten(1)
    return q[:, ::2] | q[:, 1::2] << 4, torch.stack((scale, zero), -1).transpose(0, 1).contiguous()
