"""Shared blocks of the vision towers: plain torch modules that trace to few, ATC-friendly ONNX operators.

Linear weights are kept as [in, out] so that a projection is one MatMul without a Transpose, q, k and v are separate
projections (no Slice/Squeeze chains), and attention is written out (MatMul, Softmax, MatMul).
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


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
    """Bidirectional multi-head attention; `context_width` is the width of the keys' source where it differs."""

    def __init__(self, width: int, heads: int, context_width: int | None = None):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q = Dense(width, width)
        self.k = Dense(context_width or width, width)
        self.v = Dense(context_width or width, width)
        self.out = Dense(width, width)

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self._split(self.q(x)) * (1.0 / math.sqrt(self.head_dim))
        scores = torch.matmul(q, self._split(self.k(context)).transpose(-1, -2))
        mixed = torch.matmul(torch.softmax(scores, dim=-1), self._split(self.v(context)))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, t):
        return t.view(t.shape[0], t.shape[1], self.heads, self.head_dim).transpose(1, 2)


def gelu_erf(x):
    return F.gelu(x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, activation=gelu_erf):
        super().__init__()
        self.up, self.down, self.activation = Dense(width, inner), Dense(inner, width), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class PreNormBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, width: int, heads: int, inner: int, eps: float, activation=gelu_erf):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width, eps=eps), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width, eps=eps), Mlp(width, inner, activation)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Normalize(nn.Module):
    """NHWC picture with raw values 0..255 -> NCHW, scaled to 0..1, channel-wise (x - mean) / std."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, nhwc):
        mean = torch.tensor(self.mean, dtype=nhwc.dtype).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=nhwc.dtype).view(1, 3, 1, 1)
        return (nhwc.permute(0, 3, 1, 2) / 255.0 - mean) / std
