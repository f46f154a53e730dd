"""The quantised directory: shards, index, description, config and the small files of the float checkpoint.

What the layers became flows in, beside the float checkpoint for everything else; tensors are written one by one. The
directory is filled in a work folder and published at the end: the description, without which nothing loads, comes last.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.checkpoint.quantized import FILE
from models.checkpoint.shards import SAFETENSORS_DTYPES, stored_entries
from runtime.common.files import write_atomically

STORED = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SHARD_BYTES = 4 << 30
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".index.json",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
)


@dataclass
class Entry:
    """One tensor to write: `read` gives it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    entries: list[Entry], folder: Path, kind: str, progress, layers: Sequence[Path] = ()
) -> list[str]:
    """Shards named as msmodelslim names them, and an index if there are several -> file names.

    layers: complete shards that come after those of `entries`, which have at most SHARD_BYTES each; they are linked.
    """
    shards = _split(entries)
    stem = f"quant_model_weight_{kind.lower()}"
    count = len(shards) + len(layers)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]
    )
    total = sum(entry.nbytes for entry in entries)
    done = 0
    for name, shard in zip(names, shards):
        for written in _write_shard(folder / name, shard):
            done += written
            progress(done, total)
    for name, file in zip(names[len(shards) :], layers):
        _link(file, folder / name)
    if count == 1:
        return names
    index = f"{stem}.safetensors.index.json"
    write_atomically(folder / index, json.dumps(_index(folder, names), indent=2) + "\n")
    return [*names, index]


def _link(file: Path, target: Path):
    """The same bytes under a second name, without a copy where the file system can do that."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _index(folder: Path, names: list[str]) -> dict:
    stored = {name: stored_entries(folder / name) for name in names}
    return {
        "metadata": {
            "total_size": sum(
                entry.nbytes for entries in stored.values() for entry in entries.values()
            )
        },
        "weight_map": {tensor: name for name, entries in stored.items() for tensor in entries},
    }


def _split(entries: list[Entry]) -> list[list[Entry]]:
    shards = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > SHARD_BYTES:
            shards = [*shards, []]
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shard(file: Path, entries: list[Entry]) -> Iterator[int]:
    """Header, then tensor after tensor; yields the bytes of each."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start = end
        end = end + entry.nbytes
        header[entry.name] = {
            "dtype": STORED[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.read().to(entry.dtype).contiguous()
            yield stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_description(kinds: dict[str, str], kind: str) -> str:
    """kinds: of every tensor; kind: what the folder is called."""
    return json.dumps({"model_quant_type": kind, "version": "1.0.0", **kinds}, indent=2) + "\n"


def write_config(config: dict, kind: str, dtype: torch.dtype) -> str:
    """config.json with what the engines look for: `quantize` (MindIE), `torch_dtype` and `dtype` (old and new spelling)."""
    name = str(dtype).split(".")[1]
    return (
        json.dumps(
            config | {"quantize": kind.lower(), "torch_dtype": name, "dtype": name},
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )


def copy_small_files(source: Path, folder: Path) -> list[str]:
    """Tokenizer, processor, generation_config, the release's code: everything but weights and config.json."""
    names = [
        file.name
        for file in sorted(source.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(WEIGHTS)
        and file.name != "config.json"
    ]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def publish(folder: Path, out: Path, names: list[str]):
    """Move finished files into `out`, the description last."""
    (out / FILE).unlink(missing_ok=True)
    for name in [*(name for name in names if name != FILE), FILE]:
        os.chmod(folder / name, 0o644)
        os.replace(folder / name, out / name)
