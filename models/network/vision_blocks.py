"""Shared blocks of the vision towers: torch modules that trace to few, ATC-friendly operators.

Linear weights are kept as [in, out] so that a projection is one MatMul without a Transpose; q, k
and v are separate projections (no Slice/Squeeze chains); attention is MatMul, Softmax, MatMul.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.errors import ModelError


def repeated_lists(tower: nn.Module) -> list[str]:
    """Paths of the outermost ModuleLists, whose members make up nearly all of a tower."""
    lists = [name for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    return [name for name in lists if not any(name.startswith(other + ".") for other in lists)]


class Dense(nn.Module):
    """y = x @ weight + bias with weight [in, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Bidirectional multi-head attention.

    context_width: of what keys and values are made from, where that is not the input itself.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        if width % heads:
            raise ModelError(
                f"the vision encoder is {width} wide, which its {heads} attention heads do not "
                "divide; take config.json from the release"
            )
        self.heads = heads
        self.head_dim = width // heads
        self.crossed = context_width is not None
        self.q = Dense(width, width)
        self.k = Dense(context_width or width, width)
        self.v = Dense(context_width or width, width)
        self.out = Dense(width, width)

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self._split(self.q(x)) * (1.0 / math.sqrt(self.head_dim))
        mixed = self.mix(q, self._split(self.k(context)), self._split(self.v(context)))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def mix(self, q, k, v):
        """softmax(q k^T) v, each [B, heads, rows, head_dim]; q is scaled already."""
        scores = torch.matmul(q, k.transpose(-1, -2))
        return torch.matmul(torch.softmax(scores, dim=-1), v)

    def _split(self, t):
        return t.view(t.shape[0], t.shape[1], self.heads, self.head_dim).transpose(1, 2)


def with_class_token(patches, token):
    """patches [B, N, width], token [width] or [1, width] -> [B, 1 + N, width], the token first."""
    token = token.expand(patches.shape[0], 1, -1)
    return torch.cat((token, patches), dim=1)


def gelu_erf(x):
    return F.gelu(x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, activation=gelu_erf):
        super().__init__()
        self.up = Dense(width, inner)
        self.down = Dense(inner, width)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class PreNormBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, width: int, heads: int, inner: int, eps: float, activation=gelu_erf):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner, activation)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Normalize(nn.Module):
    """NHWC image with raw values 0..255 -> NCHW, scaled to 0..1, channel-wise (x - mean) / std."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = tuple(mean)
        self.std = tuple(std)

    def forward(self, nhwc):
        mean = torch.tensor(self.mean, dtype=nhwc.dtype).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=nhwc.dtype).view(1, 3, 1, 1)
        return (nhwc.permute(0, 3, 1, 2) / 255.0 - mean) / std


class GluAdapter(nn.Module):
    """Patches [B, width, g, g] of a tower -> feature rows [B, (g/2)^2 + 2, hidden] of the decoder.

    Four patches become one row (convolution), then projection, norm and a gated MLP; the learned
    rows of the begin and end marks stand around them.
    """

    def __init__(self, width: int, hidden: int, inner: int):
        super().__init__()
        self.conv = nn.Conv2d(width, hidden, 2, 2)
        self.project = Dense(hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden, eps=1e-5)
        self.gate = Dense(hidden, inner, bias=False)
        self.up = Dense(hidden, inner, bias=False)
        self.down = Dense(inner, hidden, bias=False)
        self.boi = nn.Parameter(torch.empty(1, 1, hidden))
        self.eoi = nn.Parameter(torch.empty(1, 1, hidden))

    def forward(self, grid):
        x = self.conv(grid).flatten(2).transpose(1, 2)
        x = gelu_erf(self.norm(self.project(x)))
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        begin = self.boi.expand(x.shape[0], -1, -1)
        end = self.eoi.expand(x.shape[0], -1, -1)
        return torch.cat((begin, x, end), dim=1)
