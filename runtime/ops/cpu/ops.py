"""Fast kernels on the CPU.

Takes and returns what ReferenceOps does. Computes with torch's fused norms, scaled-dot-product
attention with grouped heads, in-place cache writes and int8 matmuls on VNNI instructions; with our
own kernels (native.py) in bfloat16, where a small batch is each decode step.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from models.checkpoint.quantized import Quantized
from models.network.decoder import Step
from models.network.linear import Linear
from runtime.common.allocator import keep_freed_memory
from runtime.ops.fused import FusedOps
from runtime.ops.reference import add_norm_bias, dequantize, dequantized, not_finite, quantize

from . import native
from .native import ZERO
from .native_library import missing
from .packed_weights import FloatWeight, Int8Rows, small_batch_matmul_of

ACTIVATION = 1 << 26  # bytes; larger ones, a vision encoder's scores, go back to the system
BLOCK = 1 << 17  # activations rounded at a time: what stays in the cache is 3 times as fast


class PackedInt8(Int8Rows):
    """A Quantized layer, static or W8A8_DYNAMIC, without its plain weight.

    Static layers: the part of quant_bias not folded into the integer sums is added in float.
    Dynamic layers: the bias is.
    """

    def __init__(self, layer: Quantized):
        super().__init__(layer.weight, layer.scale)
        self._layer = replace(layer, weight=layer.weight.new_empty(0))
        self._bias = layer.bias
        if layer.static:  # (q - offset) @ w + rest = q @ w + quant_bias
            sums = self._rest.long() // ZERO  # of the weight's rows, negative
            self._bias = (layer.bias - layer.input_offset * sums).float() * layer.scale
            self._rest += layer.bias

    def __call__(self, x):
        """x [T, k] -> [T, n] in its dtype."""
        layer = self._layer
        if self._blocks and native.is_small_batch(x):
            return self.small_batch_matmul()(x)
        q, token_scale = _round_unsigned(x, layer)
        if layer.static:
            out = torch.float32 if x.dtype == torch.float16 else x.dtype
            y = self.matmul(q, ZERO + layer.input_offset, self._bias, out)
            return y.add_(not_finite(x)).to(x.dtype)
        y = self.matmul(q, ZERO, None, torch.float32).mul_(token_scale)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(x.dtype)

    def _make_matmul(self, _):
        layer = self._layer
        if layer.static:
            return super()._make_matmul(None, layer.input_scale, layer.input_offset)
        return super()._make_matmul(self._bias)


@dataclass
class CpuStep(Step):
    """A Step with what the layers of a decoder share.

    wide_cos, signed_sin [T, 1, head_dim]: for all heads of a token; the first half of the sines is
    negative.
    places: per sequence the index of its first block when its blocks lie in a row, else the
    blocks' indices; None before the first layer.
    native_step: the step for native.py's kernels, False where they do not support it; None before
    the first layer.
    """

    wide_cos: torch.Tensor | None = None
    signed_sin: torch.Tensor | None = None
    places: list | None = None
    native_step: native.Step | bool | None = None


class CpuOps(FusedOps):
    name = "cpu"

    def __init__(self):
        self._native_layers = None
        self._built_from = []  # the cache, norm and layers that _native_layers was built from

    def remark(self, dtype):
        slower = dtype == torch.bfloat16 and missing()
        return f" (answers come slower than they could: {slower})" if slower else ""

    def loaded(self):
        """From now on the memory of activations is kept for the next step: asking the system for it
        anew, page by page, takes half as long as a prompt's matmuls."""
        keep_freed_memory(ACTIVATION, 4 * ACTIVATION)

    def pack(self, weight):
        if weight.dtype in (torch.float32, torch.bfloat16):
            return FloatWeight(weight)
        return weight  # fp16 has no kernel

    def linear(self, x, linear):
        if isinstance(linear.weight, torch.Tensor):
            return super().linear(x, linear)
        return linear.weight(x, linear.bias)

    def pack_quantized(self, layer, dtype):
        if layer.kind == "W8A16":  # the arithmetic is float; so is the form
            linear = dequantized(layer, dtype)
            return Linear(self.pack(linear.weight), linear.bias)
        if not torch.cpu._is_vnni_supported():  # without VNNI oneDNN's 16-bit sums may saturate
            return layer
        return PackedInt8(layer)

    def quantized_linear(self, x, layer):
        if not isinstance(layer, Quantized):
            return layer(x)
        q, token_scale = quantize(x, layer)
        total = torch._int_mm(q.to(torch.int8), layer.weight.t())
        y = dequantize(total, token_scale, layer)
        return (y + not_finite(x) if layer.static else y).to(x.dtype)

    def rms_norm(self, x, norm, eps):
        """In float32 and in place: torch's own is several times slower on many rows of bfloat16."""
        if native.kernels_support(x) and native.Norm.supports(norm):
            return native.add_rms_norm(x, None, norm, eps)[0]
        y = x.to(torch.float32, copy=True)
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        factor = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y.mul_(factor).mul_(norm.weight.float())
        return add_norm_bias(y.to(x.dtype), norm)

    def add_rms_norm(self, x, residual, norm, eps):
        if native.kernels_support(x) and native.Norm.supports(norm):
            return native.add_rms_norm(x, residual, norm, eps)
        return super().add_rms_norm(x, residual, norm, eps)

    def swiglu(self, x):
        if native.kernels_support(x) and x.shape[1] % 32 == 0:
            return native.swiglu(x)
        return super().swiglu(x)

    def rotated_qkv(self, qkv, config, step):
        """In place, or q and k together: half the calls of ReferenceOps.rope on each."""
        rotated = config.heads + config.kv_heads
        if native.kernels_support(qkv) and config.head_dim % 32 == 0 and qkv.is_contiguous():
            native.apply_rope(qkv, step.cos, step.sin, rotated)
            return self.heads(qkv, config, step)
        heads = qkv.view(len(qkv), -1, config.head_dim)
        qk, v = heads.split((rotated, config.kv_heads), dim=1)
        first, second = qk.chunk(2, dim=-1)
        swapped = torch.cat((second, first), -1)
        qk = torch.addcmul(qk * step.wide_cos, swapped, step.signed_sin)
        q, k = qk.split((config.heads, config.kv_heads), dim=1)
        return q, k, v

    def begin(self, step, config, device):
        first, second = step.sin[:, None].chunk(2, dim=-1)
        return CpuStep(
            **vars(super().begin(step, config, device)),
            wide_cos=step.cos[:, None],
            signed_sin=torch.cat((-first, second), -1),
        )

    def all_layers(self, decoder, x, step, cache):
        if self.team is not None:
            return None
        native_step = self._step_for_kernels(x, decoder.config, step, cache.block_size)
        if not native_step:
            return None
        layers = self._layers_of(decoder, cache)
        return layers(x, native_step) if layers else None

    def _layers_of(self, decoder, cache):
        """native.Layers of what now makes up the decoder; None where it computes layer by layer."""
        parts = [cache, decoder.final_norm, *decoder.layers]
        before = self._built_from
        same = len(parts) == len(before) and all(a is b for a, b in zip(parts, before))
        if not same:
            self._built_from = parts
            self._native_layers = _native_layers(decoder, cache)
        return self._native_layers

    def attend(self, qkv, keys, values, config, step):
        native_step = self._step_for_kernels(qkv, config, step, keys.shape[1])
        if native_step:
            return native_step.attend(qkv, keys, values)
        # where all scores of a token are NaN, or some -Inf, torch's attention may give 0: its whole
        # row becomes NaN before, in the cache too, and its output after that
        bad = not_finite(qkv)
        return super().attend(qkv + bad, keys, values, config, step).add_(bad)

    def _step_for_kernels(self, x, config, step, block):
        """The step for native.py's kernels where they support it, else False."""
        if step.native_step is None:  # the same for every layer
            one_each = step.q_lens == [1] * len(x) and config.head_dim % 32 == 0
            supported = one_each and native.is_small_batch(x)
            step.native_step = supported and native.Step(step, config, block)
        return step.native_step

    def attention(self, q, k, v, keys, values, step):
        if step.places is None:  # the same for every layer
            tables = zip(step.block_table, step.kv_lens)
            step.places = [_places(table, length, keys.shape[1]) for table, length in tables]
        outputs = []
        start = 0
        for place, rows, length in zip(step.places, step.q_lens, step.kv_lens):
            own = slice(start, start + rows)
            if rows == length:  # a whole prompt: no need to read its keys and values from the cache
                context = (k[own], v[own])
            else:
                context = (_read(keys, place, length), _read(values, place, length))
            outputs.append(sequence_attention(q[own], *context, step.causal))
            start += rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _native_layers(decoder, cache) -> native.Layers | None:
    """The decoder for native.py's kernels; None where torch computes a part of it."""
    matmuls = []
    for layer in decoder.layers:
        linears = (layer.qkv, layer.out, layer.up, layer.down)
        matmuls.append([small_batch_matmul_of(linear) for linear in linears])
    if native.Layers.support(decoder) and all(map(all, matmuls)):
        return native.Layers(decoder, matmuls, cache)
    return None


def _round_unsigned(x, layer):
    """x [T, k] -> (its values as `quantize` rounds them, + ZERO, uint8 [T, k]; scale of each token
    float32 [T, 1], None for a static layer)."""
    if native.kernels_support(x):
        if layer.static:
            return native.round_activations(x, layer.input_scale, layer.input_offset)[0], None
        return native.round_activations(x)
    blocks = x.split(max(1, BLOCK // x.shape[1]))
    q, scales = zip(*(_round_block(rows, layer) for rows in blocks))
    if len(blocks) == 1:
        return q[0], scales[0]
    return torch.cat(q), None if layer.static else torch.cat(scales)


def _round_block(x, layer):
    q, token_scale = quantize(x, layer)
    return q.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO), token_scale


def _places(table, length, block_size):
    """Where a sequence of `length` tokens lies in the cache: index of its first block when its
    blocks lie in a row, else the indices of all."""
    blocks = table[: -(-length // block_size)]
    first = int(blocks[0])
    in_a_row = torch.equal(blocks, torch.arange(first, first + len(blocks), dtype=blocks.dtype))
    return first if in_a_row else blocks


def _read(cache, place, length):
    """[length, kv_heads, head_dim] of one sequence; without a copy where its blocks lie in a
    row."""
    if isinstance(place, int):
        start = place * cache.shape[1]
        return cache.flatten(0, 1)[start : start + length]
    return cache.index_select(0, place).flatten(0, 1)[:length]


def sequence_attention(q, k, v, causal: bool):
    """q [rows, heads, head_dim] against k, v [length, kv_heads, head_dim] -> [rows, heads,
    head_dim].

    causal: of the length tokens the last `rows` are q's own, and each sees none after it.
    """
    rows = len(q)
    length = len(k)
    if rows == 1:  # the queries of a head group as rows: no copies of its keys
        k, v = (t.transpose(0, 1).unsqueeze(0) for t in (k, v))
        grouped = q.view(1, k.shape[1], -1, q.shape[2])
        return F.scaled_dot_product_attention(grouped, k, v).view(q.shape)
    mask = None
    if causal and rows < length:
        mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and rows == length,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed.squeeze(0).transpose(0, 1)
