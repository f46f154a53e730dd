"""A vision tower optimised for the CPU: packed weights, q, k and v in one matmul, fused attention.

Takes the plain module (models/network/vision_blocks.py) with weights as stored, returns the same
module with its Dense and Attention parts replaced, one after another, so that at most one layer is
in memory twice. Norms and the residual stay float32, whatever the precision.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models.network.linear import Linear
from models.network.patch_tower import PatchAttention, Separation, rotated
from models.network.vision_blocks import Attention, Dense
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.metrics import cosine
from runtime.ops.cpu.ops import CpuOps
from runtime.ops.cpu.packed_weights import Int8Weight
from runtime.ops.reference import not_finite

COSINE = {"bf16": 0.99, "int8": 0.98}  # of the features' worst row, on an image of waves and noise
NEXT_BETTER = {"bf16": "fp32", "int8": "bf16"}
WAVES = ((1, 0.5), (3, 5), (11, 7))  # periods over the width and the height, one pair a channel
OPS = CpuOps()


class PackedDense(nn.Module):
    """Dense layers [k, n] of one input, their outputs side by side: [..., k] -> [..., sum of n].

    Takes any dtype; returns float32 in fp32, else bfloat16. int8: activations are rounded to 8 bits
    with a scale per token.
    """

    def __init__(self, parts: list[Dense], precision: str):
        super().__init__()
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        rows = torch.cat([part.weight.detach().t() for part in parts])
        bias = None
        if parts[0].bias is not None:
            bias = torch.cat([part.bias.detach() for part in parts]).to(self.dtype)
        if precision == "int8":
            weight = Int8Weight.from_tensors(Int8Weight.tensors(rows))
        else:
            weight = OPS.pack(rows.to(self.dtype))
        self.linear = Linear(weight, bias)

    def forward(self, x):
        rows = x.to(self.dtype).flatten(0, -2)
        return OPS.linear(rows, self.linear).unflatten(0, x.shape[:-1])


class FusedAttention(nn.Module):
    """models.network.vision_blocks.Attention with one matmul for all that looks at the same input:
    q, k and v; with a context q, and k and v."""

    def __init__(self, plain: Attention, precision: str):
        super().__init__()
        self.heads = plain.heads
        self.out = PackedDense([plain.out], precision)
        groups = [[plain.q, plain.k, plain.v]]
        if plain.crossed:
            groups = [[plain.q], [plain.k, plain.v]]
        self.matmuls = nn.ModuleList(PackedDense(group, precision) for group in groups)

    def forward(self, x, context=None):
        """x [batch, rows, width], context [batch, other rows, width] -> [batch, rows, width]."""
        if context is None:
            q, k, v = self.matmuls[0](x).chunk(3, -1)
        else:
            q = self.matmuls[0](x)
            k, v = self.matmuls[1](context).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        # torch's attention may give 0 where scores are NaN or -Inf
        bad = not_finite(q) + not_finite(k).amax(-2, keepdim=True)
        mixed = F.scaled_dot_product_attention(q, k, v) + bad
        return self.out(mixed.transpose(1, 2).flatten(2))


class FusedPatchAttention(nn.Module):
    """models.network.patch_tower.PatchAttention with one matmul for q, k and v; each picture is
    attended to alone, so that no score of patches of different pictures is computed."""

    def __init__(self, plain: PatchAttention, precision: str):
        super().__init__()
        self.heads = plain.heads
        self.q_norm = plain.q_norm
        self.k_norm = plain.k_norm
        self.qkv = PackedDense([plain.q, plain.k, plain.v], precision)
        self.out = PackedDense([plain.out], precision)

    def forward(self, x, cos, sin, counts):
        """x [N, width], counts: rows of each picture -> [N, width]."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).chunk(3, -1))
        q = rotated(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotated(self.k_norm(k), cos, sin).to(v.dtype)
        pictures = zip(q.split(counts), k.split(counts), v.split(counts))
        return self.out(torch.cat([self._attend(*picture) for picture in pictures]).flatten(1))

    def _attend(self, *picture):
        """q, k, v [n, heads, head_dim] -> [n, heads, head_dim]"""
        q, k, v = (t.transpose(0, 1)[None] for t in picture)
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


class PictureCounts(nn.Module):
    """In place of models.network.patch_tower.Separation: segments [N, 1] -> rows of each picture."""

    def __init__(self, plain: Separation, precision: str):
        super().__init__()

    def forward(self, segments):
        return torch.unique_consecutive(segments, return_counts=True)[1].tolist()


FUSED = {
    Attention: FusedAttention,
    PatchAttention: FusedPatchAttention,
    Separation: PictureCounts,
}


def pack(tower: nn.Module, precision: str) -> nn.Module:
    """The tower with packed parts, in place; what is not packed becomes float32."""
    _replace(tower, precision)
    return tower.float()


def pack_checked(tower: nn.Module, precision: str, *inputs: torch.Tensor) -> nn.Module:
    """`pack`, and ToolkitError when the features of a test image, the tower's `inputs`, deviate
    too far from those of float32."""
    expected = float32_features(tower, *inputs).flatten(0, -2)
    found = pack(tower, precision)(*inputs).float().flatten(0, -2)
    worst = float(cosine(expected.double().numpy(), found.double().numpy()).min())
    if not worst >= COSINE[precision]:  # NaN does not pass
        raise ToolkitError(
            f"--vision-precision {precision} changes this model's picture features too much "
            f"(cosine {worst:.4f} of the worst row, {COSINE[precision]} is needed); use "
            f"--vision-precision {NEXT_BETTER[precision]}",
            CHECK_FAILED,
        )
    return tower


def test_image(shape) -> torch.Tensor:
    return torch.from_numpy(waves_and_noise(shape))


def waves_and_noise(shape) -> np.ndarray:
    """float32 `shape` = [1, height, width, 3]: waves of several lengths and noise, 0..255."""
    y, x = np.meshgrid(*(np.linspace(0, 1, side) for side in shape[1:3]), indexing="ij")
    waves = np.stack([np.sin(2 * np.pi * (a * x + b * y)) for a, b in WAVES], -1)
    noise = np.random.default_rng(0).normal(0, 0.2, waves.shape)
    return np.clip(127.5 + 100 * (waves + noise), 0, 255).astype(np.float32)[None]


def _replace(module: nn.Module, precision: str):
    for name, child in module.named_children():
        if type(child) in FUSED:
            setattr(module, name, FUSED[type(child)](child, precision))
        elif isinstance(child, Dense):
            setattr(module, name, PackedDense([child], precision))
        else:
            _replace(child, precision)


def float32_features(tower: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Features in float32; the weights of a layer are float32 only while it computes."""
    stored = {}
    hooks = []

    def to_float32(module, _):
        stored[module] = {name: p.data for name, p in module.named_parameters(recurse=False)}
        for p in module.parameters(recurse=False):
            p.data = p.data.float()

    def restore(module, *_):
        for name, p in module.named_parameters(recurse=False):
            p.data = stored[module][name]
        del stored[module]

    for module in tower.modules():
        hooks.append(module.register_forward_pre_hook(to_float32))
        hooks.append(module.register_forward_hook(restore))
    try:
        return tower(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
