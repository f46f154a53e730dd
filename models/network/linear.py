"""Weights of the decoder as the operators take them: forms of linear layers, and norms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Linear:
    """y = x @ weight.T + bias, weight [out, in]; a backend may put a packed form in its place."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class Float32Linear:
    """A float32 linear layer in a decoder of a narrower dtype; it returns `output_dtype`."""

    linear: Linear
    output_dtype: torch.dtype


def as_float32(name: str, linear: Linear, dtype: torch.dtype) -> Float32Linear:
    """A linear layer kept in float32 in a decoder of `dtype`; name: its field in Layer.

    Inside an MLP values stay float32: only `up`, which opens it, returns float32.
    """
    return Float32Linear(linear, torch.float32 if name == "up" else dtype)


@dataclass
class LazyLinear:
    """A linear layer that `read()` returns when it is needed."""

    read: Callable[[], Linear]


@dataclass
class Norm:
    """LayerNorm (with bias) or RMSNorm over the last axis.

    An RMSNorm has a bias only where anti-outlier quantisation gave it one.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class Stacked:
    """Linear layers of one input; their outputs are concatenated along the last axis."""

    parts: list
