"""Fast torch kernels on the CPU: fused norms, scaled-dot-product attention with grouped heads, in-place cache writes,
int8 products on VNNI instructions.
"""
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models.layers import Linear
from models.quantized import Quantized

from .reference import ReferenceOps, dequantize, dequantized, quantize, shifted

ZERO = 128      # oneDNN's fast kernels take activations as uint8 with a zero point


@dataclass
class PackedInt8:
    """A Quantized layer for oneDNN: weight in its blocked layout, zero point of the activations, and what is added to the
    float result: the part of quant_bias that the zero point does not bring in (static), or nothing."""
    layer: Quantized
    weight: torch.Tensor
    zero_point: int
    bias: torch.Tensor | None
    weight_zeros: torch.Tensor


class CpuOps(ReferenceOps):
    name = "cpu"

    def pack(self, weight):
        """oneDNN's blocked layout: about 1.5 times the bandwidth of the plain one at one row, same arithmetic."""
        if weight.dtype not in (torch.float32, torch.bfloat16):     # fp16 has no packed kernel
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def linear(self, x, linear):
        if not linear.weight.is_mkldnn:
            return super().linear(x, linear)
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")

    def pack_quantized(self, layer, dtype):
        if layer.kind == "W8A16":       # the arithmetic is float; so is the form
            linear = dequantized(layer, dtype)
            return Linear(self.pack(linear.weight), linear.bias)
        if not torch.cpu._is_vnni_supported():      # without VNNI oneDNN's 16-bit sums may saturate
            return layer
        bias = None
        if layer.static:                # (q - offset) @ w + rest = q @ w + quant_bias
            rest = layer.bias + layer.input_offset * layer.weight.sum(1, dtype=torch.int64)
            bias = rest.float() * layer.scale
        packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)
        return PackedInt8(layer, packed, ZERO + layer.input_offset, bias, torch.zeros(len(layer.scale), dtype=torch.int32))

    def quantized_linear(self, x, layer):
        if isinstance(layer, Quantized):
            q, token_scale = quantize(x, layer)
            return dequantize(torch._int_mm(q.to(torch.int8), layer.weight.t()), token_scale, layer).to(x.dtype)
        q, token_scale = quantize(x, layer.layer)
        unsigned = q.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO)        # q + 128
        direct = token_scale is None and x.dtype in (torch.float32, torch.bfloat16)
        y = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, layer.zero_point, layer.weight, layer.layer.scale, layer.weight_zeros, layer.bias, 1.0, 0,
            x.dtype if direct else torch.float32, "none", [], "")
        if token_scale is not None:
            y = y.mul_(token_scale)
            y = y if layer.layer.bias is None else y.add_(layer.layer.bias)
        return y.to(x.dtype)

    def layer_norm(self, x, norm, eps):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)

    def rms_norm(self, x, norm, eps):
        return shifted(F.rms_norm(x, x.shape[-1:], norm.weight, eps), norm)

    def cache_write(self, k, v, keys, values, slots):
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, k)
        values.view(-1, *values.shape[2:]).index_copy_(0, slots, v)

    def attention(self, q, k, v, keys, values, step):
        outputs, start = [], 0
        for b, (rows, length) in enumerate(zip(step.q_lens, step.kv_lens)):
            own = slice(start, start + rows)
            fresh = rows == length      # a whole prompt: its keys and values are at hand, no need to read the cache
            context = (k[own], v[own]) if fresh else _gather(keys, values, step.block_table[b], length)
            outputs.append(_attend(q[own], *context, causal=step.causal))
            start += rows
        return torch.cat(outputs)


def _gather(keys, values, blocks, length):
    used = blocks[:-(-length // keys.shape[1])]
    return (cache.index_select(0, used).flatten(0, 1)[:length] for cache in (keys, values))


def _attend(q, k, v, causal):
    """[rows, heads, head_dim] against [length, kv_heads, head_dim]."""
    rows, length = len(q), len(k)
    mask = None
    if causal and 1 < rows < length:
        mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and rows == length,
                                           enable_gqa=q.shape[1] != k.shape[1])
    return mixed.squeeze(0).transpose(0, 1)
