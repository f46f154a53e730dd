"""Decoder pieces that are pure arithmetic: linear weights, rotary angles and the row permutations that unify the ropes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


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


@dataclass
class Stacked:
    """Linear layers of one input whose outputs lie side by side."""

    parts: list
