"""Plain torch on any device: the oracle for the other backends.

Takes and returns activations [T, width] in the model's dtype; norms, softmax and scores are
computed in fp32. Shapes: q [T, heads, head_dim], k and v [T, kv_heads, head_dim], caches [blocks,
block_size, kv_heads, head_dim]. `step` is models.network.decoder.Step.
"""

import math
from dataclasses import fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from models.network.linear import Linear
from runtime.common.machine import available_memory

SMALLEST_SCALE = 1e-12  # of a token whose values are all zero


class ReferenceOps:
    name = "reference"
    default_block_size = 16
    records_graphs = False  # decode can be recorded as device graphs
    team = None  # parallel.Team when the decoder is split over several devices

    def check(self, dtype: str):
        """ToolkitError when the backend cannot compute in `dtype`."""

    def nearest_block_size(self, wanted: int) -> int:
        """Tokens per cache block that attention here can page by, nearest to the wanted number."""
        return wanted

    def default_dtype(self, family) -> str:
        """What --dtype auto means: here still "auto", the plan chooses by size."""
        return "auto"

    def remark(self, dtype: torch.dtype) -> str:
        """What a user who computes in `dtype` should know, to be put behind the operators' name."""
        return ""

    def free_memory(self) -> int:
        """Bytes free for weights and cache."""
        return available_memory()

    def peak_bytes(self) -> int | None:
        """Most memory that this process has had on the device; None where it is the host's."""
        return None

    def loaded(self):
        """Called when weights and cache are in memory."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A linear weight [out, in] in the form `linear` wants; called once at load."""
        return weight

    def pack_quantized(self, layer, dtype: torch.dtype):
        """A models.checkpoint.quantized.Quantized layer in the form `quantized_linear` wants for
        activations of `dtype`, or a Linear; called once at load."""
        return layer

    def cache(self, config, blocks, block_size, dtype, device):
        """One layer's cache of keys, or of values, in `dtype`.

        On the CPU, pages that nobody has written to take no memory yet.
        """
        shape = (blocks, block_size, config.kv_heads, config.head_dim)
        if torch.device(device).type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        untouched = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
        return torch.from_numpy(untouched).view(dtype).view(shape)

    def begin(self, step, config, device):
        """A step built on the host -> the step that the layers get: on the device, with what the
        backend adds to it."""
        return replace(
            step,
            cos=step.cos.to(device),
            sin=step.sin.to(device),
            slots=step.slots.to(device),
            block_table=step.block_table.to(device),
        )

    def graph_inputs(self, step) -> dict[str, torch.Tensor]:
        """Tensors of a step that change from token to token: what a recorded graph reads anew on
        every replay."""
        names = [f.name for f in fields(step) if f.name not in ("order", "q_tensor")]
        values = {name: getattr(step, name) for name in names}
        return {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}

    def all_layers(self, decoder, x, step, cache):
        """All layers and the last norm at once, x [T, hidden] -> [T, hidden]; None where they are
        computed one by one."""

    def heads(self, qkv, config, step):
        """qkv [T, width] -> q, k, v."""
        qkv = qkv.view(len(qkv), -1, config.head_dim)
        return qkv.split((config.heads, config.kv_heads, config.kv_heads), dim=1)

    def rotated_qkv(self, qkv, config, step):
        """qkv [T, width] -> q, k, v, with q and k rotated to their positions."""
        q, k, v = self.heads(qkv, config, step)
        return *self.rope(q, k, step.cos, step.sin), v

    def embed(self, ids, table):
        return F.embedding(ids, table)

    def linear(self, x, linear):
        return F.linear(x, linear.weight, linear.bias)

    def all_reduce(self, x):
        """The sum of x over the devices."""
        return x if self.team is None else self.team.all_reduce(x)

    def gather(self, x):
        """[T, n] of every device -> [T, n * devices]."""
        return x if self.team is None else self.team.gather(x)

    def quantized_linear(self, x, layer):
        """x [T, k] -> [T, n] in exact integer arithmetic (models.checkpoint.quantized).

        float64 holds the sums of int8 products exactly.
        """
        if layer.kind == "W8A16":
            return self.linear(x, dequantized(layer, x.dtype))
        q, token_scale = quantize(x, layer)
        total = q.double() @ layer.weight.double().T
        y = dequantize(total, token_scale, layer)
        return (y + not_finite(x) if layer.static else y).to(x.dtype)

    def layer_norm(self, x, norm, eps):
        y = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), eps)
        return y.to(x.dtype)

    def rms_norm(self, x, norm, eps):
        y = x.float()
        mean_square = y.pow(2).mean(-1, keepdim=True)
        y = y * torch.rsqrt(mean_square + eps) * norm.weight.float()
        return add_norm_bias(y.to(x.dtype), norm)

    def add_rms_norm(self, x, residual, norm, eps):
        """(normalised sum, sum)"""
        residual = x + residual
        return self.rms_norm(residual, norm, eps), residual

    def scaled_add(self, x, residual, alpha: float):
        return torch.add(x, residual, alpha=alpha)

    def swiglu(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_tanh(self, x):
        return F.gelu(x, approximate="tanh")

    def rope(self, q, k, cos, sin):
        """Half-rotation over the full head: x * cos + [-x2, x1] * sin, in the inputs' dtype."""

        def rotate(x):
            first, second = x.chunk(2, dim=-1)
            swapped = torch.cat((-second, first), -1)
            return x * cos[:, None] + swapped * sin[:, None]

        return rotate(q), rotate(k)

    def cache_write(self, k, v, keys, values, slots):
        keys.view(-1, *keys.shape[2:])[slots] = k
        values.view(-1, *values.shape[2:])[slots] = v

    def attend(self, qkv, keys, values, config, step):
        """qkv [T, width] -> attention's output [T, heads * head_dim]; k and v go into the cache."""
        q, k, v = self.rotated_qkv(qkv, config, step)
        self.cache_write(k, v, keys, values, step.slots)
        return self.attention(q, k, v, keys, values, step).flatten(1)

    def attention(self, q, k, v, keys, values, step):
        """softmax(q k / sqrt(head_dim)) v per sequence over its cached keys and values -> [T,
        heads, head_dim]."""
        outputs = []
        for rows, table, length in zip(q.split(step.q_lens), step.block_table, step.kv_lens):
            k = _gather(keys, table, length).float()
            v = _gather(values, table, length).float()
            outputs.append(sequence_attention(rows.float(), k, v, step.causal).to(q.dtype))
        return torch.cat(outputs)


def add_norm_bias(y, norm):
    """A normalised y, plus the norm's bias if it has one."""
    return y if norm.bias is None else y + norm.bias


def dequantized(layer, dtype) -> Linear:
    """A Quantized layer as a float one in `dtype`."""
    weight = layer.weight.float() * layer.scale[:, None]
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return Linear(weight.to(dtype), bias)


def not_finite(x):
    """x [..., k] -> [..., 1]: 0, or NaN for a row with NaN or Inf, to be added to what is computed
    of it where that cannot say so: whole numbers have no NaN, torch's attention forgets some."""
    return (x * 0).sum(-1, keepdim=True)


def quantize(x, layer):
    """x [T, k] -> (whole numbers -128..127 as float32 [T, k], scale of each token [T, 1]).

    The scale is None for a static layer, which has one of its own.
    """
    x = x.to(torch.float32, copy=True)
    if layer.static:
        x.div_(layer.input_scale).add_(layer.input_offset)
        return x.round_().clamp_(-128, 127), None
    largest = x.abs().amax(-1, keepdim=True)
    scale = largest.clamp_(min=SMALLEST_SCALE) / 127
    return x.div_(scale).round_().clamp_(-128, 127), scale


def dequantize(total, token_scale, layer):
    """Sums of products [T, n] (whole numbers) -> float32 [T, n]."""
    if layer.static:
        return (total + layer.bias).float() * layer.scale
    y = total.float() * token_scale * layer.scale
    return y if layer.bias is None else y + layer.bias


def _gather(cache, blocks, length):
    """Blocks of one sequence -> [length, kv_heads, head_dim]."""
    used = -(-length // cache.shape[1])
    rows = cache[blocks[:used].long()].flatten(0, 1)
    return rows[:length]


def sequence_attention(q, k, v, causal: bool):
    """q [rows, heads, head_dim] against k, v [length, kv_heads, head_dim] -> [rows, heads,
    head_dim].

    causal: of the length tokens the last `rows` are q's own, and each sees none after it.
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1).transpose(0, 1) for t in (k, v))
    scale = q.shape[-1] ** 0.5
    scores = q.transpose(0, 1) @ k.transpose(1, 2) / scale
    if causal:
        past = k.shape[1] - q.shape[0]
        every = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        later = every.triu(past + 1)
        scores = scores.masked_fill(later, float("-inf"))
    mixed = scores.softmax(-1) @ v
    return mixed.transpose(0, 1)
