"""Takes the name of a release, writes its config and tensor names with random weights."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models import RELEASED, known_families
from models.checkpoint.shards import grouped_by_size, safetensors_header
from models.checkpoint.table import Weight
from models.errors import ModelError
from models.files import is_private_name, new_file, open_regular
from models.side_files import read_as_stored

from .releases import RELEASES, as_json_bytes

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 20  # normal values drawn per tensor; a larger tensor repeats them, rotated at random
SPREAD = 0.02  # standard deviation of matrices and biases, and of norm weights around 1


@dataclass(frozen=True)
class Shard:
    """A file of `size` bytes to write: the safetensors `header`, then the tensors in order."""

    file: Path
    header: bytes
    weights: list[Weight]
    size: int

    @property
    def finished(self) -> bool:
        return (
            self.file.is_file()
            and self.file.stat().st_size == self.size
            and self._start() == self.header
        )

    @property
    def foreign(self) -> bool:
        return self.file.exists() and b'"synthetic"' not in self._start()

    def _start(self) -> bytes:
        with open_regular(self.file) as stream:
            return stream.read(len(self.header))


def write_checkpoint(
    like: str,
    out: str | Path,
    scale: str = "full",
    seed: int = 0,
    report=print,
    progress: Callable[[int, int], None] = lambda done, total: None,
    changes: dict | None = None,
) -> None:
    """Write the checkpoint of release `like` into `out`, going on where an interrupted run stopped.

    `changes` of the release's config, e.g. {"num_layers": 1}. `report(line)` gets the plan,
    `progress(done, total)` counts bytes. ModelError when `out` holds other files or the disk is too
    small.
    """
    out = Path(out)
    config, files = _release(like, scale)
    config = _merged(config, changes or {})
    shards, index = _plan(config, out, {"like": like, "scale": scale, "seed": seed})
    manifest = {INDEX: as_json_bytes(index), "config.json": as_json_bytes(config)}
    _prepare(out, shards, files | manifest, report)
    for name, content in files.items():
        _write(out / name, [content])
    total = sum(shard.size for shard in shards)
    done = 0
    for shard in shards:
        if not shard.finished:
            blocks = _blocks(shard, config["torch_dtype"], seed)
            _write(
                shard.file, blocks, lambda written, before=done: progress(before + written, total)
            )
        done += shard.size
        progress(done, total)
    for name, content in manifest.items():
        _write(out / name, [content])


def _release(like: str, scale: str) -> tuple[dict, dict[str, bytes]]:
    """config.json as a dict, and the tokenizer files."""
    release = read_as_stored(RELEASED / f"{like}.json")
    config = release["config"] if scale == "full" else _merged(release["config"], release["tiny"])
    files, fields = RELEASES[like](release["tokenizer_config"], scale == "full")
    return _merged(config, fields), files


def _merged(config: dict, changes: dict) -> dict:
    merged = dict(config)
    for key, value in changes.items():
        known = config.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) else value
    return merged


def _plan(config: dict, out: Path, label: dict) -> tuple[list[Shard], dict]:
    """Shards of at most SHARD_BYTES, tensors in table order, and the index that names them."""
    family = next(family for family in known_families() if family.matches(config))
    dtype = getattr(torch, config["torch_dtype"])
    weights = family(out, config).weights()

    def nbytes_of(weight):
        return math.prod(weight.shape) * dtype.itemsize

    groups = grouped_by_size(weights, nbytes_of, SHARD_BYTES)
    shards = []
    for k, group in enumerate(groups, 1):
        file = out / f"model-{k:05}-of-{len(groups):05}.safetensors"
        shards.append(_shard(file, group, dtype, label))
    total = sum(shard.size - len(shard.header) for shard in shards)
    file_of = {}
    for shard in shards:
        file_of.update((weight.source, shard.file.name) for weight in shard.weights)
    return shards, {"metadata": {"total_size": total}, "weight_map": file_of}


def _shard(file: Path, weights: list[Weight], dtype: torch.dtype, label: dict) -> Shard:
    tensors = [(weight.source, dtype, weight.shape) for weight in weights]
    header = safetensors_header(tensors, {"format": "pt", "synthetic": json.dumps(label)})
    values = sum(math.prod(weight.shape) for weight in weights)
    return Shard(file, header, weights, len(header) + values * dtype.itemsize)


def _prepare(out: Path, shards: list[Shard], others: Iterable[str], report) -> None:
    """Refuses a directory with other files and a disk too small.

    Then index and config.json of an older run go, so that nothing in `out` looks complete.
    """
    from rich.filesize import decimal

    ours = {shard.file.name for shard in shards} | set(others)
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out} is a file; choose another --out")
    for file in out.glob(".*"):
        if is_private_name(file.name):
            file.unlink()  # of a killed run
    foreign = [file.name for file in out.glob("*") if file.name not in ours]
    foreign += [shard.file.name for shard in shards if shard.foreign]
    if foreign:
        raise ModelError(
            f"{out} holds files of something else ({foreign[0]}); "
            "choose an empty directory as --out"
        )
    need = sum(shard.size for shard in shards if not shard.finished)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    report(f"{decimal(need)} to write to {out}, {decimal(free)} free on its disk")
    if need > free:
        raise ModelError(
            f"{out} needs {decimal(need)}, its disk has {decimal(free)} free; "
            "free some space or choose another --out"
        )
    if need:
        for name in (INDEX, "config.json"):
            (out / name).unlink(missing_ok=True)


def _blocks(shard: Shard, dtype: str, seed: int) -> Iterator[bytes | memoryview]:
    yield shard.header
    for weight in shard.weights:
        yield from _tensor_blocks(weight, dtype, seed)


def _tensor_blocks(weight: Weight, dtype: str, seed: int) -> Iterator[memoryview]:
    """Bytes of one tensor, N(0, 0.02) or norms around 1; only seed and name decide on them."""
    count = math.prod(weight.shape)
    dtype = getattr(torch, dtype)
    name_digest = hashlib.sha256(weight.source.encode()).digest()
    random = np.random.default_rng([seed, *name_digest])
    values = random.standard_normal(min(count, BLOCK), dtype=np.float32) * SPREAD
    if len(weight.shape) == 1 and weight.source.endswith(".weight"):
        values += 1
    twice = torch.from_numpy(np.concatenate((values, values))).to(dtype)
    stored = twice.view(torch.uint8).numpy()
    for start in range(0, count, BLOCK):
        nbytes = min(BLOCK, count - start) * dtype.itemsize
        first = int(random.integers(len(values))) * dtype.itemsize
        yield stored[first : first + nbytes].data


def _write(file: Path, blocks: Iterable[bytes | memoryview], progress=lambda written: None) -> None:
    """Write under another name, then rename: `file` is complete or not there."""
    written = 0
    try:
        with new_file(file, durable=False) as stream:
            for block in blocks:
                written += stream.write(block)
                progress(written)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be written ({error.strerror}); finished shards are kept, "
            "run the same command again to go on"
        ) from None
