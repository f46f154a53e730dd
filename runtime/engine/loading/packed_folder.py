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

from models.checkpoint.shards import DamagedFile, Entry, stored_entries
from models.checkpoint.tensor_files import load_tensors
from models.errors import ModelError
from models.files import read_record
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


def check_listed(folder: Path, layouts: dict[str, Layout]):
    """DamagedPack unless the folder holds these weights, all as they were written, in their
    layouts."""
    entries = _read_list(folder)
    if set(entries) != {name + SUFFIX for name in layouts}:
        raise DamagedPack(f"{folder / LIST} lists other weights than this model's")
    for name, layout in layouts.items():
        file = folder / f"{name}{SUFFIX}"
        try:
            open_private(file).close()
            problem = problem_of(file, entries[file.name], LIST)
            if problem is None and not _has_layout(stored_entries(file), layout):
                problem = "holds other shapes or types than this model's"
        except (OSError, TypeError, KeyError, DamagedFile, ModelError) as error:
            problem = f"cannot be used ({error})"
        if problem:
            raise DamagedPack(f"{file} {problem}")


def read_weights(folder: Path, layouts: dict[str, Layout]) -> Iterator[tuple[str, dict]]:
    """(name, {tensor name: tensor}) of every weight; DamagedPack as `check_listed`."""
    check_listed(folder, layouts)
    for name in layouts:
        file = folder / f"{name}{SUFFIX}"
        try:
            yield name, load_tensors(file)
        except (OSError, SafetensorError) as error:
            raise DamagedPack(f"{file} cannot be read ({error})") from None


def _read_list(folder: Path) -> dict:
    try:
        with open_private(folder / LIST) as stream:
            return dict(read_record(stream))
    except FileNotFoundError:
        raise DamagedPack(f"{folder} has no {LIST}, so it is not complete") from None
    except (OSError, ValueError, TypeError, ModelError) as error:
        raise DamagedPack(f"{folder / LIST} cannot be read ({error})") from None


def _has_layout(stored: dict[str, Entry], layout: Layout) -> bool:
    if set(stored) != set(layout):
        return False
    for name, (dtype, shape) in layout.items():
        entry = stored[name]
        right_type = entry.dtype.is_floating_point if dtype is None else entry.dtype == dtype
        if entry.shape != shape or not right_type:
            return False
    return True
