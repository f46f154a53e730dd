"""Rotary position embedding: angles, and the order of rows that two ways of rotating need."""

import torch

from models.config import Rope


def rotary_angles(rope: Rope, head_dim: int, positions: torch.Tensor):
    """positions int [T, channels] -> (cos, sin) fp32 [T, head_dim] for the half-rotation x * cos +
    rotate_half(x) * sin.

    Angles pos * theta^(-2j/dim), channel after channel, then zeros up to head_dim / 2; the row is
    that half twice.
    """
    inv = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.half_rounded:
        inv = inv.half().float()
    angles = (positions.float()[:, :, None] * inv).flatten(1)
    angles = torch.nn.functional.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), angles.sin()), -1)


def two_halves_order(head_dim: int) -> torch.Tensor:
    """Row order that turns ChatGLM-6B's two independent half-width rotations into one full-width
    half-rotation.
    """
    a, b, c, d = torch.arange(head_dim).chunk(4)
    return torch.cat((a, c, b, d))


def interleaved_order(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Row order that turns adjacent-pair rotation of the first `rotary_dim` channels into the
    half-rotation.

    The untouched channels are shared out behind both halves, where their angle is zero.
    """
    rotated = torch.arange(rotary_dim)
    rest = torch.arange(rotary_dim, head_dim)
    first, second = rest.chunk(2) if len(rest) else (rest, rest)
    return torch.cat((rotated[0::2], first, rotated[1::2], second))


def permute_heads(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the rows of every head: rows [heads * head_dim, ...], order [head_dim]."""
    return rows.view(-1, len(order), *rows.shape[1:])[:, order].reshape(rows.shape)
