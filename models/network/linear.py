"""Decoder pieces that are pure arithmetic: linear weights, rotary angles and the row permutations that unify the ropes."""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.family import Rope


@dataclass
class Linear:
    """y = x @ weight.T + bias, weight [out, in]. Backends may replace it by a packed form in their `prepare`."""
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class Wide:
    """A float32 linear layer in a decoder of a narrower dtype: takes its input as float32 and gives `out`."""
    linear: Linear
    out: torch.dtype


def widened(name: str, linear: Linear, dtype: torch.dtype) -> Wide:
    """name: of the linear layer in its Layer. What lies inside an MLP stays float32, all else goes on in `dtype`."""
    return Wide(linear, torch.float32 if name == "up" else dtype)


@dataclass
class Late:
    """A linear layer that `read()` gives when its turn comes."""
    read: Callable[[], Linear]


@dataclass
class Norm:
    """LayerNorm (with bias) or RMSNorm (a bias only where anti-outlier quantisation gave it one) over the last axis."""
    weight: torch.Tensor
    bias: torch.Tensor | None = None


def rotary_angles(rope: Rope, head_dim: int, positions: torch.Tensor):
    """positions int [T, channels] -> (cos, sin) fp32 [T, head_dim] for the half-rotation x * cos + rotate_half(x) * sin.

    Angles pos * theta^(-2j/dim), channel after channel, then zeros up to head_dim / 2; the row is that half twice.
    """
    inv = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.half_rounded:
        inv = inv.half().float()
    angles = (positions.float()[:, :, None] * inv).flatten(1)
    angles = torch.nn.functional.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), angles.sin()), -1)


def two_halves_order(head_dim: int) -> torch.Tensor:
    """Row order that turns ChatGLM-6B's two independent half-width rotations into one full-width half-rotation."""
    a, b, c, d = torch.arange(head_dim).chunk(4)
    return torch.cat((a, c, b, d))


def interleaved_order(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Row order that turns adjacent-pair rotation of the first `rotary_dim` channels into the half-rotation.

    The untouched channels are shared out behind both halves, where their angle is zero.
    """
    rotated, rest = torch.arange(rotary_dim), torch.arange(rotary_dim, head_dim)
    first, second = rest.chunk(2) if len(rest) else (rest, rest)
    return torch.cat((rotated[0::2], first, rotated[1::2], second))


def permute_heads(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the rows of every head: rows [heads * head_dim, ...], order [head_dim]."""
    return rows.view(-1, len(order), *rows.shape[1:])[:, order].reshape(rows.shape)
