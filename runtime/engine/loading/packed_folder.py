"""A folder of packed weights in the cache: takes a folder and the layout of each weight, returns
the stored tensors.

files.json, which is written last, lists every file with its size and sha256. A file that is not as
listed, or whose tensors do not have the layout that the kernels read, raises DamagedPack.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.errors import ModelError
from runtime.common.files import file_entry, open_private, problem_of, write_atomically

LIST = "files.json"
SUFFIX = ".safetensors"

Layout = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]  # None: any float type


class DamagedPack(Exception):
    """A folder that cannot be used; the message says why."""


def write_list(folder: Path):
    """Marks the folder as complete."""
    entries = {file.name: file_entry(file) for file in sorted(folder.glob(f"*{SUFFIX}"))}
    write_atomically(folder / LIST, json.dumps(entries))


def check_listed(folder: Path, names: list[str]):
    """DamagedPack unless the folder holds the weights of these names, all as they were written."""
    try:
        with open_private(folder / LIST) as stream:
            entries = json.load(stream)
        if set(entries) != {name + SUFFIX for name in names}:
            raise DamagedPack(f"{folder / LIST} lists other weights than this model's")
        for name, entry in entries.items():
            open_private(folder / name).close()
            if problem := problem_of(folder / name, entry, LIST):
                raise DamagedPack(f"{folder / name} {problem}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ModelError) as error:
        raise DamagedPack(f"{error}") from None


def read_weights(folder: Path, layouts: dict[str, Layout]) -> Iterator[tuple[str, dict]]:
    """(name, {tensor name: tensor}) of every weight; DamagedPack if one has another layout."""
    check_listed(folder, list(layouts))
    for name, layout in layouts.items():
        file = folder / f"{name}{SUFFIX}"
        try:
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DamagedPack(f"{file} cannot be read ({error})") from None
        if not _has_layout(stored, layout):
            raise DamagedPack(f"{file} holds other shapes or types than this model's")
        yield name, stored


def _has_layout(stored: dict[str, torch.Tensor], layout: Layout) -> bool:
    if set(stored) != set(layout):
        return False
    for name, (dtype, shape) in layout.items():
        tensor = stored[name]
        right_type = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not right_type:
            return False
    return True
