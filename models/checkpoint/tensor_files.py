"""Whole safetensors files. Takes a path in any locale, reads or writes a dict of tensors."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from models.files import native_path


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file. OSError or SafetensorError for one that is none."""
    with native_path(path) as name:
        return load_file(name)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata=None):
    """Writes contiguous tensors as a safetensors file."""
    with native_path(path) as name:
        save_file(tensors, name, metadata)
