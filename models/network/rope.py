"""Rotary position embedding.

Takes positions, returns angles; and the row orders that bring every release's rotation to one form.
"""

import torch

from models.config import Rope


def rotary_angles(rope: Rope, head_dim: int, positions: torch.Tensor):
    """positions int [T, channels] -> (cos, sin) float32 [T, head_dim].

    For the half-rotation x * cos + rotate_half(x) * sin. Angles pos * theta^(-2j/dim), channel
    after channel (with sections: each of one channel), then zeros up to head_dim / 2; the row is
    that half twice.
    """
    inv = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.half_rounded:
        inv = inv.half().float()
    positions = positions.float()
    if rope.sections:
        channel_of_angle = torch.repeat_interleave(torch.tensor(rope.sections))
        angles = positions[:, channel_of_angle] * inv
    else:
        angles = (positions[:, :, None] * inv).flatten(1)
    angles = torch.nn.functional.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def two_halves_order(head_dim: int) -> torch.Tensor:
    """Row order [head_dim] that makes ChatGLM-6B's two half-width rotations one half-rotation."""
    a, b, c, d = torch.arange(head_dim).chunk(4)
    return torch.cat((a, c, b, d))


def interleaved_order(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Row order [head_dim] that makes a rotation of adjacent pairs the half-rotation.

    Pairs are those of the first `rotary_dim` channels; half of the others stands behind each half,
    where the angle is zero.
    """
    rotated = torch.arange(rotary_dim)
    rest = torch.arange(rotary_dim, head_dim)
    first, second = rest.chunk(2) if len(rest) else (rest, rest)
    return torch.cat((rotated[0::2], first, rotated[1::2], second))


def permute_heads(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the rows of every head: rows [heads * head_dim, ...], order [head_dim]."""
    heads = rows.view(-1, len(order), *rows.shape[1:])
    return heads[:, order].reshape(rows.shape)
