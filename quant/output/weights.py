"""Weight files of a quantised folder: safetensors shards and their index.

Takes entries, whose tensors are read and written one at a time, and complete shards; returns the
names of the files.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.checkpoint.shards import grouped_by_size, safetensors_header, stored_entries
from models.files import named
from runtime.common.files import write_atomically

SHARD_BYTES = 4 << 30


@dataclass
class Entry:
    """A tensor to write, which `read` returns when its turn comes. kind: as the description calls
    it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    entries: list[Entry],
    folder: Path,
    kind: str,
    progress,
    layers: Sequence[Path] = (),
    one_file: bool = False,
) -> list[str]:
    """Write shards named as msmodelslim names them, and an index if there are several -> names of
    the files.

    layers: complete shards that come after those of `entries`, which have at most SHARD_BYTES each;
    they are linked. progress(done, total) is called with bytes. one_file: all entries in one.
    """
    shards = [entries]
    if not one_file:
        shards = grouped_by_size(entries, lambda entry: entry.nbytes, SHARD_BYTES)
    stem = f"quant_model_weight_{kind.lower()}"
    names = _shard_names(stem, len(shards) + len(layers))
    done = 0
    total = sum(entry.nbytes for entry in entries)
    for name, shard in zip(names, shards):
        for written in _write_shard(folder / name, shard):
            done += written
            progress(done, total)
    for name, file in zip(names[len(shards) :], layers):
        _link(file, folder / name)
    if len(names) == 1:
        return names
    index = f"{stem}.safetensors.index.json"
    write_atomically(folder / index, json.dumps(_index(folder, names), indent=2) + "\n")
    return [*names, index]


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _link(file: Path, target: Path):
    """Give the file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _index(folder: Path, names: list[str]) -> dict:
    total = 0
    file_of = {}
    for name in names:
        for tensor, entry in stored_entries(folder / name).items():
            total += entry.nbytes
            file_of[tensor] = name
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def _write_shard(file: Path, entries: list[Entry]) -> Iterator[int]:
    """Header, then tensor after tensor; yields the bytes of each."""
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    with named(file), open(file, "wb") as stream:
        stream.write(safetensors_header(tensors, {"format": "pt"}))
        for entry in entries:
            tensor = entry.read().to(entry.dtype).contiguous()
            yield stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
