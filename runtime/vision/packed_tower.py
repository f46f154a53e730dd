"""A vision tower made quick on the CPU: weights packed for its products, q, k and v in one, fused attention.

The plain module (network/vision_blocks.py), weights as stored, flows in; the same module with its Dense and Attention parts
replaced, one after another, flows out, so that at most one layer is in memory twice. Norms and the residual stay float32,
whatever the precision.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.network.linear import Linear
from models.network.vision_blocks import Attention, Dense
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.metrics import cosine
from runtime.ops.cpu.ops import CpuOps
from runtime.ops.cpu.packed_weights import Int8Weight

COSINE = {"bf16": 0.99, "int8": 0.98}  # of the features' worst row, on a picture of waves and noise
OPS = CpuOps()


class PackedDense(nn.Module):
    """Dense layers [k, n] of one input, their outputs side by side; float32 goes in and out in fp32, else bfloat16. int8:
    activations are rounded to 8 bits with a scale per token."""

    def __init__(self, parts: list[Dense], precision: str):
        super().__init__()
        rows = torch.cat([part.weight.detach().t() for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        weight = (
            Int8Weight.from_tensors(Int8Weight.tensors(rows))
            if precision == "int8"
            else OPS.pack(rows.to(self.dtype))
        )
        self.linear = Linear(weight, None if bias is None else bias.to(self.dtype))

    def forward(self, x):
        return OPS.linear(x.to(self.dtype).flatten(0, -2), self.linear).unflatten(0, x.shape[:-1])


class FusedAttention(nn.Module):
    """models.network.vision_blocks.Attention with one product for all that looks at the same input."""

    def __init__(self, plain: Attention, precision: str):
        super().__init__()
        self.heads = plain.heads
        self.out = PackedDense([plain.out], precision)
        groups = (
            ([plain.q], [plain.k, plain.v]) if plain.crossed else ([plain.q, plain.k, plain.v],)
        )
        self.products = nn.ModuleList(PackedDense(group, precision) for group in groups)

    def forward(self, x, context=None):
        if context is None:
            q, k, v = self.products[0](x).chunk(3, -1)
        else:
            q, (k, v) = self.products[0](x), self.products[1](context).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def pack(tower: nn.Module, precision: str) -> nn.Module:
    """The tower with packed parts, in place; what is not packed becomes float32."""
    _replace(tower, precision)
    return tower.float()


def pack_checked(tower: nn.Module, precision: str, input_shape) -> nn.Module:
    """`pack`, and ToolkitError when the features of a test picture depart too far from those of float32."""
    pixels = torch.from_numpy(test_picture(input_shape))
    expected = _exact(tower, pixels)
    found = pack(tower, precision)(pixels).float()
    worst = float(
        cosine(*(rows.flatten(0, 1).double().numpy() for rows in (expected, found))).min()
    )
    if not worst >= COSINE[precision]:
        raise ToolkitError(
            f"--vision-precision {precision} changes this model's picture features too much (cosine "
            f"{worst:.4f} of the worst row, {COSINE[precision]} is needed); use --vision-precision "
            f"{'fp32' if precision == 'bf16' else 'bf16'}",
            CHECK_FAILED,
        )
    return tower


def test_picture(shape) -> np.ndarray:
    """float32 `shape`: waves of several lengths and noise, 0..255."""
    y, x = np.meshgrid(*(np.linspace(0, 1, side) for side in shape[1:3]), indexing="ij")
    waves = np.stack(
        [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((1, 0.5), (3, 5), (11, 7))], -1
    )
    noise = np.random.default_rng(0).normal(0, 0.2, waves.shape)
    return np.clip(127.5 + 100 * (waves + noise), 0, 255).astype(np.float32)[None]


def _replace(module: nn.Module, precision: str):
    for name, child in module.named_children():
        if isinstance(child, Attention):
            setattr(module, name, FusedAttention(child, precision))
        elif isinstance(child, Dense):
            setattr(module, name, PackedDense([child], precision))
        else:
            _replace(child, precision)


def _exact(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Features in float32; the weights of a layer are float32 only while it computes."""
    stored = {}
    hooks = []

    def widen(module, _):
        stored[module] = {name: p.data for name, p in module.named_parameters(recurse=False)}
        for p in module.parameters(recurse=False):
            p.data = p.data.float()

    def restore(module, *_):
        for name, p in module.named_parameters(recurse=False):
            p.data = stored[module][name]
        del stored[module]

    for module in tower.modules():
        hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        return tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
