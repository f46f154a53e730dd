"""The operator set on Ascend NPUs: torch_npu's aclnn kernels, and ATB's where the chip needs them.

Takes and returns what ReferenceOps does: activations packed [T, width]. Which kernel runs, which
storage format weights and cache have, and on which side the lengths lie is read from the chip's row
in `socs.py`. Host work of a step (lengths, padding, the order of rows) is done once in `begin`, not
once per layer.

Kernels are called through torch.ops, whose schemas the tests declare in a torch without torch_npu.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional as F

from models.network.decoder import Step
from runtime.ascend.socs import NZ, KernelSet, Soc
from runtime.common.errors import ToolkitError
from runtime.ops.fused import AcceleratorOps
from runtime.ops.reference import add_norm_bias

from .kernels import ATTENTION, WRITES
from .masks import Masks

PAD_TO_MULTIPLE = ("context", "prompt")


@dataclass
class NpuStep(Step):
    """A Step with its tensors on the device, and what the kernels want besides.

    cos, sin [1, rows, 1, head_dim]; slots int32 [T]; rows >= T: tokens with padding, which forms a
    sequence of its own.
    order int32: heads of the packed qkv rows, all of q, then k, then v; None when they already lie
    so (one row).
    q_tensor int32 on the host; kv_tensor int32 where the kernels read it (None: they take kv_lens);
    q_ends: running sum of the query lengths.
    mask: what this step's queries see, for kernels that want all of it.
    """

    phase: str = ""
    rows: int = 0
    order: torch.Tensor | None = None
    q_tensor: torch.Tensor | None = None
    kv_tensor: torch.Tensor | None = None
    q_ends: list[int] | None = None
    mask: torch.Tensor | None = None


@dataclass
class NpuInt8:
    """A Quantized layer [n, k] for the NPU.

    weight int8 [k, n]; scale [n] in the form the chip's matmul takes; bias int32 [n] added to its
    sums (static) or float [n] added to its result; inverse and offset [k] of the activations
    (static); zeros [1, k]: what x makes of them is NaN where it holds NaN or Inf (static).
    """

    kind: str
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    inverse: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    zeros: torch.Tensor | None = None


def phase(step: Step) -> str:
    """Which of the four kinds of step it is, each with an attention kernel of its own.

    context: seen both ways, nothing cached before it; prompt: causal, nothing cached before it;
    token: one new token per sequence; extension: anything else.
    """
    if not step.causal:
        return "context"
    if max(step.q_lens) == 1:
        return "token"
    return "prompt" if step.q_lens == step.kv_lens else "extension"


class NpuOps(AcceleratorOps):
    name = "npu"

    def __init__(self, soc: Soc, device: str, kernels: KernelSet | None = None):
        """kernels: one of the chip's sets (default: the newest of the first)."""
        super().__init__(device)
        self.soc = soc
        self.kernels = kernels or next(iter(soc.kernels.values()))[0]
        self.masks = Masks(device)
        self._write = WRITES[self.kernels.cache_write].call
        self._attention = {phase: ATTENTION[k] for phase, k in self.kernels.attention.items()}

    @property
    def records_graphs(self):
        return self.kernels.graphs

    @property
    def default_block_size(self) -> int:
        return self.kernels.block_sizes[0]

    def check(self, dtype: str):
        """ToolkitError when the chip cannot compute in `dtype`."""
        if dtype not in self.soc.dtypes:
            raise ToolkitError(
                f"{self.soc.name} does not support --dtype {dtype}; use --dtype "
                f"{' or '.join(self.soc.dtypes)}"
            )

    def nearest_block_size(self, wanted: int) -> int:
        """Of those that the chip's attention pages by; the larger of two as near."""
        return min(self.kernels.block_sizes, key=lambda size: (abs(size - wanted), -size))

    @property
    def dtypes(self):
        return self.soc.dtypes

    @property
    def accelerator(self):
        return torch.npu

    def new_graph(self, step):
        """(graph, keyword arguments of `torch.npu.graph`)"""
        return torch.npu.NPUGraph(), {"auto_dispatch_capture": step.kv_tensor is None}

    # weights and cache

    def pack(self, weight):
        if self.soc.weight_format == NZ:
            return torch.ops.npu.npu_format_cast(weight, NZ)
        return weight

    def pack_quantized(self, layer, dtype):
        if layer.kind == "W8A8_DYNAMIC" and not self.soc.token_scales:
            raise ToolkitError(
                f"{self.soc.name} has no int8 matmul with a scale per token, which W8A8_DYNAMIC needs; "
                "quantise with --scheme w8a8"
            )
        if layer.static:
            return self._pack_static(layer, dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        scale = layer.scale.to(dtype) if layer.kind == "W8A16" else layer.scale
        return NpuInt8(layer.kind, self._int8(layer.weight), scale, bias)

    def _pack_static(self, layer, dtype):
        shape = layer.weight.shape[1:]
        device = layer.weight.device
        inverse = torch.full(shape, 1 / layer.input_scale, dtype=dtype, device=device)
        offset = torch.full(shape, layer.input_offset, dtype=dtype, device=device)
        scale = layer.scale
        if dtype == torch.float16 or self.soc.int64_scales:  # float32 bits in the low half
            scale = torch.ops.npu.npu_trans_quant_param(scale)
        return NpuInt8(
            layer.kind,
            self._int8(layer.weight),
            scale,
            layer.bias,
            inverse,
            offset,
            inverse.new_zeros(1, len(inverse)),
        )

    def _int8(self, weight):
        """[n, k] -> [k, n] in the chip's format; the tiles of 310P are laid out before the axes are
        exchanged."""
        if self.soc.weight_format == NZ:
            return self.pack(weight).transpose(0, 1)
        return weight.t().contiguous()

    def cache(self, config, blocks, block_size, dtype, device):
        if self.soc.cache_format != NZ:
            return super().cache(config, blocks, block_size, dtype, device)
        tiles = config.kv_heads * config.head_dim // 16
        plain = torch.zeros(
            blocks,
            tiles,
            block_size,
            16,
            dtype=dtype,
            device=device,
        )
        return torch.ops.npu.npu_format_cast(plain, NZ)

    # one step

    def begin(self, step, config, device):
        kind = phase(step)
        tokens = len(step.cos)
        padding = -tokens % self.soc.token_multiple if kind in PAD_TO_MULTIPLE else 0
        q_lens = step.q_lens
        if padding:
            q_lens = [*q_lens, padding]
        cos, sin = (
            F.pad(t, (0, 0, 0, padding))[None, :, None].to(device) for t in (step.cos, step.sin)
        )
        mask_of = self._attention[kind].mask
        kv_tensor = None
        if self.kernels.lengths != "list":
            kv_tensor = torch.tensor(step.kv_lens, dtype=torch.int32)
        if self.kernels.lengths == "device":
            kv_tensor = kv_tensor.to(device)
        return NpuStep(
            cos,
            sin,
            step.slots.to(device, torch.int32),
            step.block_table.to(device),
            q_lens,
            step.kv_lens,
            step.causal,
            phase=kind,
            rows=tokens + padding,
            order=_heads_order(tokens, padding, config, device),
            q_tensor=torch.tensor(q_lens, dtype=torch.int32),
            q_ends=list(accumulate(q_lens)),
            kv_tensor=kv_tensor,
            mask=mask_of and mask_of(self.masks, q_lens, step.kv_lens),
        )

    def heads(self, qkv, config, step):
        if step.order is None:
            return super().heads(qkv, config, step)
        q_rows = step.rows * config.heads
        kv_rows = step.rows * config.kv_heads
        ordered = qkv.view(-1, config.head_dim).index_select(0, step.order)
        q, k, v = ordered.split((q_rows, kv_rows, kv_rows))
        shape = (step.rows, -1, config.head_dim)
        return q.view(shape), k.view(shape), v.view(shape)

    def linear(self, x, linear):
        if self.soc.fused_bias or linear.bias is None:
            return F.linear(x, linear.weight, linear.bias)
        return F.linear(x, linear.weight).add_(linear.bias)

    def quantized_linear(self, x, layer):
        if layer.kind == "W8A16":
            return torch.ops.npu.npu_weight_quant_batchmatmul(
                x, layer.weight, layer.scale, bias=layer.bias
            )
        if layer.inverse is not None:
            q = torch.ops.npu.npu_quantize(
                x,
                layer.inverse,
                layer.offset,
                torch.qint8,
                -1,
                False,
            )
            y = torch.ops.npu.npu_quant_matmul(
                q,
                layer.weight,
                layer.scale,
                bias=layer.bias,
                output_dtype=x.dtype,
            )
            return y.add_(F.linear(x, layer.zeros))  # whole numbers cannot be NaN
        q, scale = torch.ops.npu.npu_dynamic_quant(x)
        y = torch.ops.npu.npu_quant_matmul(
            q,
            layer.weight,
            layer.scale,
            pertoken_scale=scale,
            output_dtype=x.dtype,
        )
        return y if layer.bias is None else y.add_(layer.bias)

    def rms_norm(self, x, norm, eps):
        return add_norm_bias(torch.ops.npu.npu_rms_norm(x, norm.weight, eps)[0], norm)

    def add_rms_norm(self, x, residual, norm, eps):
        y, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, norm.weight, eps)
        return add_norm_bias(y, norm), total

    def swiglu(self, x):
        if x.shape[-1] % self.soc.swiglu_multiple:
            return super().swiglu(x)
        return torch.ops.npu.npu_swiglu(x)

    def gelu_tanh(self, x):
        return torch.ops.npu.npu_gelu(x, approximate="tanh")

    def rope(self, q, k, cos, sin):
        q, k = torch.ops.npu.npu_apply_rotary_pos_emb(q[None], k[None], cos, sin)  # in place
        return q[0], k[0]

    def cache_write(self, k, v, keys, values, slots):
        tokens = len(slots)
        self._write(k[:tokens], v[:tokens], keys, values, slots)

    def attention(self, q, k, v, keys, values, step):
        kernel = self._attention[step.phase].call
        mixed = kernel(self, q, k, v, keys, values, step)
        return mixed[: len(step.slots)]


def _heads_order(tokens, padding, config, device):
    """NpuStep.order for packed rows of `tokens` tokens and as much padding, which repeats token
    0."""
    if tokens + padding == 1:
        return None
    rows = torch.cat((torch.arange(tokens), torch.zeros(padding, dtype=torch.int64)))
    heads = torch.arange(config.heads + 2 * config.kv_heads)
    table = rows[:, None] * len(heads) + heads
    q, k, v = table.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
    return torch.cat((q.flatten(), k.flatten(), v.flatten())).to(device, torch.int32)
