"""A checkpoint: its files, its weight table, and the tensors read from them."""

from .reader import Checkpoint

__all__ = ["Checkpoint"]
