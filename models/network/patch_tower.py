"""The vision tower of pictures of any size: GLM-OCR, GLM-4.1V, GLM-4.6V-Flash.

Takes rows of patches with their geometry as inputs (patch_geometry.py), returns a feature row per
2 x 2 patches; several pictures stand one behind the other. No axis holds a batch, and no operator
asks for the number of rows, so that one graph serves every size.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from models.config import BLOCK_PATCHES, PATCH_VALUES
from models.errors import ModelError

from .vision_blocks import Dense, gelu_erf

APART = -10000.0  # added to the scores of patches of different pictures; exact in fp16


@dataclass(frozen=True)
class PatchTowerConfig:
    """inner: width of a block's MLP. merged: width of the merger's. out: of the features. positions:
    patches along a side of the learned position map; 0 without one."""

    width: int
    layers: int
    heads: int
    inner: int
    merged: int
    out: int
    eps: float
    bias: bool
    qk_norm: bool
    positions: int

    def __post_init__(self):
        if self.width % self.heads or self.width // self.heads % 4:
            raise ModelError(
                f"the vision encoder is {self.width} wide with {self.heads} attention heads, whose "
                "size must be a multiple of 4; take config.json from the release"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class RmsNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + eps)"""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        mean = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean + self.eps) * self.weight


class PatchAttention(nn.Module):
    """Bidirectional attention within each picture: x [N, width], cos and sin [N, 1, head_dim / 2],
    apart [N, N] -> [N, width]."""

    def __init__(self, config: PatchTowerConfig):
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.head_dim
        width = config.width
        self.q = Dense(width, width, config.bias)
        self.k = Dense(width, width, config.bias)
        self.v = Dense(width, width, config.bias)
        self.out = Dense(width, width, config.bias)
        self.q_norm = RmsNorm(self.head_dim, config.eps) if config.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(self.head_dim, config.eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, apart):
        q = rotated(self.q_norm(self._split(self.q(x))), cos, sin).transpose(0, 1)
        k = rotated(self.k_norm(self._split(self.k(x))), cos, sin).permute(1, 2, 0)
        v = self._split(self.v(x)).transpose(0, 1)
        scores = torch.matmul(q * (1.0 / math.sqrt(self.head_dim)), k) + apart
        mixed = torch.matmul(torch.softmax(scores, dim=-1), v)
        return self.out(mixed.transpose(0, 1).flatten(1))

    def _split(self, x):
        return x.view(-1, self.heads, self.head_dim)


def rotated(x, cos, sin):
    """x [N, heads, head_dim], each half of a head against the other; cos and sin [N, 1, half]."""
    half = x.shape[-1] // 2
    first = x[..., :half]
    second = x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class GluMlp(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate = Dense(width, inner, bias)
        self.up = Dense(width, inner, bias)
        self.down = Dense(inner, width, bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PatchBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: PatchTowerConfig):
        super().__init__()
        self.attention_norm = RmsNorm(config.width, config.eps)
        self.attention = PatchAttention(config)
        self.mlp_norm = RmsNorm(config.width, config.eps)
        self.mlp = GluMlp(config.width, config.inner, config.bias)

    def forward(self, x, cos, sin, apart):
        x = x + self.attention(self.attention_norm(x), cos, sin, apart)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nn.Module):
    """Four patches of a block, side by side [N / 4, 4 width], -> feature rows [N / 4, out]."""

    def __init__(self, config: PatchTowerConfig):
        super().__init__()
        out = config.out
        self.downsample = Dense(BLOCK_PATCHES * config.width, out)
        self.project = Dense(out, out, bias=False)
        self.norm = nn.LayerNorm(out, eps=1e-5)
        self.mlp = GluMlp(out, config.merged, bias=False)

    def forward(self, blocks):
        return self.mlp(gelu_erf(self.norm(self.project(self.downsample(blocks)))))


class Separation(nn.Module):
    """segments [N, 1], the number of each row's picture, -> [N, N]: 0 within a picture, else
    APART."""

    def forward(self, segments):
        difference = segments - segments.transpose(0, 1)
        return torch.clamp(difference * difference, max=1.0) * APART


class PatchTower(nn.Module):
    """patches [N, PATCH_VALUES], angles [N, head_dim] (cosines, then sines), segments [N, 1], and with a
    position map its values at the patches, positions [N, width] -> features [N / 4, out]."""

    def __init__(self, config: PatchTowerConfig):
        super().__init__()
        self.half = config.head_dim // 2
        self.width = config.width
        self.embed = Dense(PATCH_VALUES, config.width)
        self.embed_norm = None
        if config.positions:
            self.embed_norm = RmsNorm(config.width, config.eps)
        self.separation = Separation()
        self.blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width, config.eps)
        self.merger = Merger(config)

    def forward(self, patches, angles, segments, positions=None):
        x = self.embed(patches)
        if self.embed_norm is not None:
            x = self.embed_norm(x) + positions
        cos = angles[:, : self.half].unsqueeze(1)
        sin = angles[:, self.half :].unsqueeze(1)
        apart = self.separation(segments)
        for block in self.blocks:
            x = block(x, cos, sin, apart)
        return self.merger(self.norm(x).view(-1, BLOCK_PATCHES * self.width))
