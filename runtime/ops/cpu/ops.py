"""Fast kernels on the CPU: torch's fused norms, scaled-dot-product attention with grouped heads, in-place cache writes, int8
products on VNNI instructions; our own (native.py) for a few tokens in bfloat16, each step of an answer.
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from models.checkpoint.quantized import Quantized
from models.network.decoder import Step
from models.network.linear import Linear
from runtime.ops.reference import ReferenceOps, dequantize, dequantized, quantize, shifted

from . import native
from .native import ZERO
from .packed_weights import FloatWeight, Int8Rows, product_of

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc
ACTIVATION = 1 << 26  # bytes; larger ones, a vision encoder's scores, go back to the system
BLOCK = 1 << 17  # activations rounded at a time: what stays in the cache is 3 times as fast


class PackedInt8(Int8Rows):
    """A Quantized layer, static or W8A8_DYNAMIC, without its plain weight. To the float result is added the part of quant_bias
    that the zero point does not bring in (static), or the bias."""

    def __init__(self, layer: Quantized):
        super().__init__(layer.weight, layer.scale)
        self._layer = replace(layer, weight=layer.weight.new_empty(0))
        self._bias = layer.bias
        if layer.static:  # (q - offset) @ w + rest = q @ w + quant_bias
            self._bias = (
                layer.bias - layer.input_offset * (self._rest.long() // ZERO)
            ).float() * layer.scale
            self._rest += layer.bias

    def __call__(self, x):
        """x [T, k] -> [T, n] in its dtype."""
        layer = self._layer
        if self._blocks and native.suits(x):
            return self.few()(x)
        q, token_scale = _unsigned(x, layer)
        if layer.static:
            out = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
            return self.product(q, ZERO + layer.input_offset, self._bias, out).to(x.dtype)
        y = self.product(q, ZERO, None, torch.float32).mul_(token_scale)
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)

    def _product(self, _):
        layer = self._layer
        return (
            super()._product(None, layer.input_scale, layer.input_offset)
            if layer.static
            else super()._product(self._bias)
        )


class CpuOps(ReferenceOps):
    name = "cpu"

    def __init__(self):
        self._made = []
        self._layers = None  # what native.Layers were last made from, and they

    def remark(self, dtype):
        slower = dtype == torch.bfloat16 and native.missing()
        return f" (answers come slower than they could: {slower})" if slower else ""

    def loaded(self):
        """From now on glibc keeps the memory of activations for the next step: asking the system for it anew, page by page,
        takes half as long as a prompt's products."""
        if keep := getattr(ctypes.CDLL(None), "mallopt", None):
            keep(M_MMAP_THRESHOLD, ACTIVATION)
            keep(M_TRIM_THRESHOLD, 4 * ACTIVATION)

    def pack(self, weight):
        return (
            FloatWeight(weight) if weight.dtype in (torch.float32, torch.bfloat16) else weight
        )  # fp16 has no kernel

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
        return dequantize(torch._int_mm(q.to(torch.int8), layer.weight.t()), token_scale, layer).to(
            x.dtype
        )

    def layer_norm(self, x, norm, eps):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)

    def rms_norm(self, x, norm, eps):
        """In float32 and in place: torch's own is several times slower on many rows of bfloat16."""
        if native.suits(x, native.ANY) and native.Norm.suits(norm):
            return native.add_rms_norm(x, None, norm, eps)[0]
        y = x.to(torch.float32, copy=True)
        size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y.mul_(size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(norm.weight.float())
        return shifted(y.to(x.dtype), norm)

    def add_rms_norm(self, x, residual, norm, eps):
        if not (native.suits(x, native.ANY) and native.Norm.suits(norm)):
            return super().add_rms_norm(x, residual, norm, eps)
        return native.add_rms_norm(x, residual, norm, eps)

    def swiglu(self, x):
        return (
            native.swiglu(x)
            if native.suits(x, native.ANY) and x.shape[1] % 32 == 0
            else super().swiglu(x)
        )

    def turned_heads(self, qkv, config, step):
        """In place, or q and k together: half the calls of turning each (see ReferenceOps.rope)."""
        if native.suits(qkv, native.ANY) and config.head_dim % 32 == 0 and qkv.is_contiguous():
            native.turn(qkv, step.cos, step.sin, config.heads + config.kv_heads)
            return self.heads(qkv, config, step)
        turned, v = qkv.view(len(qkv), -1, config.head_dim).split(
            (config.heads + config.kv_heads, config.kv_heads), dim=1
        )
        first, second = turned.chunk(2, dim=-1)
        turned = torch.addcmul(
            turned * step.wide_cos, torch.cat((second, first), -1), step.signed_sin
        )
        return *turned.split((config.heads, config.kv_heads), dim=1), v

    def cache_write(self, k, v, keys, values, slots):
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, k)
        values.view(-1, *values.shape[2:]).index_copy_(0, slots, v)

    def begin(self, step, config, device):
        first, second = step.sin[:, None].chunk(2, dim=-1)
        return CpuStep(
            **vars(super().begin(step, config, device)),
            wide_cos=step.cos[:, None],
            signed_sin=torch.cat((-first, second), -1),
        )

    def all_layers(self, decoder, x, step, cache):
        few = self._few(x, decoder.config, step, cache.block_size)
        layers = few and self.team is None and self._native_layers(decoder, cache)
        return layers(x, few) if layers else None

    def _native_layers(self, decoder, cache):
        """native.Layers of what now makes up the decoder; None where it computes layer by layer."""
        made = [cache, decoder.final_norm, *decoder.layers]
        if len(made) != len(self._made) or any(a is not b for a, b in zip(made, self._made)):
            linears = [
                [product_of(linear) for linear in (layer.qkv, layer.out, layer.up, layer.down)]
                for layer in decoder.layers
            ]
            suit = native.Layers.suit(decoder) and all(map(all, linears))
            self._made = made
            self._layers = native.Layers(decoder, linears, cache) if suit else None
        return self._layers

    def attend(self, qkv, keys, values, config, step):
        few = self._few(qkv, config, step, keys.shape[1])
        return (
            few.attend(qkv, keys, values)
            if few
            else super().attend(qkv, keys, values, config, step)
        )

    def _few(self, x, config, step, block):
        """The step for native.py's kernels where it suits them, else False."""
        if step.few is None:  # the same for every layer
            one_each = step.q_lens == [1] * len(x) and config.head_dim % 32 == 0
            step.few = one_each and native.suits(x) and native.Step(step, config, block)
        return step.few

    def attention(self, q, k, v, keys, values, step):
        if step.places is None:  # the same for every layer
            step.places = [
                _places(*row, keys.shape[1]) for row in zip(step.block_table, step.kv_lens)
            ]
        outputs = []
        start = 0
        for places, rows, length in zip(step.places, step.q_lens, step.kv_lens):
            own = slice(start, start + rows)
            fresh = (
                rows == length
            )  # a whole prompt: its keys and values are at hand, no need to read the cache
            context = (
                (k[own], v[own])
                if fresh
                else (_read(keys, places, length), _read(values, places, length))
            )
            outputs.append(_attend(q[own], *context, causal=step.causal))
            start += rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _unsigned(x, layer):
    """x [T, k] -> (its values as `quantize` rounds them, + ZERO, uint8 [T, k]; scale of each token or None)."""
    if native.suits(x, native.ANY):
        if layer.static:
            return native.rounded(x, layer.input_scale, layer.input_offset)[0], None
        return native.rounded(x)
    found = [_block(rows, layer) for rows in x.split(max(1, BLOCK // x.shape[1]))]
    if len(found) == 1:
        return found[0]
    q, scales = zip(*found)
    return torch.cat(q), None if layer.static else torch.cat(scales)


def _block(x, layer):
    q, token_scale = quantize(x, layer)
    return q.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO), token_scale


@dataclass
class CpuStep(Step):
    """wide_cos, signed_sin [T, 1, head_dim]: for all heads of a token; the first half of the sines negative.
    places: per sequence the index of its first block when its blocks lie in a row, else the blocks' indices.
    few: native.Step where it suits the kernels, else False."""

    wide_cos: torch.Tensor | None = None
    signed_sin: torch.Tensor | None = None
    places: list | None = None
    few: native.Step | bool | None = None


def _places(table, length, block_size):
    blocks = table[: -(-length // block_size)]
    first = int(blocks[0])
    in_a_row = torch.equal(blocks, torch.arange(first, first + len(blocks), dtype=blocks.dtype))
    return first if in_a_row else blocks


def _read(cache, places, length):
    """[length, kv_heads, head_dim] of one sequence; without a copy where its blocks lie in a row."""
    if isinstance(places, int):
        start = places * cache.shape[1]
        return cache.flatten(0, 1)[start : start + length]
    return cache.index_select(0, places).flatten(0, 1)[:length]


def _attend(q, k, v, causal):
    """[rows, heads, head_dim] against [length, kv_heads, head_dim]."""
    rows = len(q)
    length = len(k)
    if rows == 1:  # the queries of a head group as rows: no copies of its keys
        k, v = (t.transpose(0, 1).unsqueeze(0) for t in (k, v))
        return F.scaled_dot_product_attention(q.view(1, k.shape[1], -1, q.shape[2]), k, v).view(
            q.shape
        )
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
