"""Synthetic checkpoints: a released layout at real shapes with random weights, to rehearse before downloading.

    python -m models.synthetic --like visualglm-6b --out DIR [--scale full|tiny] [--seed 0]

A release's config (models/released/*.json) flows in; names and shapes come from the family's own weight table; safetensors
shards, index, tokenizer and config.json flow out. Tensors are streamed in small blocks and seeded one by one, so that
the bytes do not depend on where a run was interrupted. Finished shards are kept, index and config.json come last.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .base import ModelError, Weight, read_json

RELEASED = Path(__file__).parent / "released"
SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 20                 # normal values drawn per tensor; a larger tensor repeats them, rotated at random
SPREAD = 0.02                   # standard deviation of matrices, and of norm weights around 1
DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Shard:
    """One file to write: its safetensors header (with the length in front), its tensors, its size in bytes."""
    file: Path
    header: bytes
    weights: list[Weight]
    size: int

    @property
    def finished(self) -> bool:
        if not self.file.is_file() or self.file.stat().st_size != self.size:
            return False
        with open(self.file, "rb") as stream:
            return stream.read(len(self.header)) == self.header


def visualglm_files(tokenizer_config: dict, full: bool) -> tuple[dict[str, bytes], dict]:
    """Tokenizer files {name: bytes}, and the config fields that follow from them."""
    import sentencepiece

    from .synthetic_text import ice_text
    vocabulary = ice_text(base_pieces=130000 if full else None)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    ids = {"bos_token_id": "<sop>", "eos_token_id": "<eop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
    fields = {field: pieces.piece_to_id(piece) for field, piece in ids.items()}
    return {"ice_text.model": vocabulary, "tokenizer_config.json": _json(tokenizer_config)}, fields


TOKENIZERS: dict[str, Callable] = {"visualglm-6b": visualglm_files}        # one row per release


def write_checkpoint(like: str, out: Path, scale: str = "full", seed: int = 0,
                     progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Write the checkpoint of release `like` into `out`, resuming what an interrupted run left; returns its bytes.

    `progress(done, total)` counts weight bytes. Raises ModelError when `out` holds other files or the disk is too small.
    """
    config, files = _release(like, scale)
    shards, index = _plan(config, Path(out), {"like": like, "scale": scale, "seed": seed})
    manifest = {"model.safetensors.index.json": _json(index), "config.json": _json(config)}
    _prepare(Path(out), shards, {**files, **manifest})
    for name, content in files.items():
        _replace(Path(out) / name, [content])
    total, done = sum(shard.size for shard in shards), 0
    for shard in shards:
        if not shard.finished:
            blocks = _counted(_shard_blocks(shard, config["torch_dtype"], seed), lambda n: progress(done + n, total))
            _replace(shard.file, blocks)
        done += shard.size
        progress(done, total)
    for name, content in manifest.items():
        _replace(Path(out) / name, [content])
    return total


def _release(like: str, scale: str) -> tuple[dict, dict[str, bytes]]:
    """config.json as a dict, and the tokenizer files."""
    release = read_json(RELEASED / f"{like}.json")
    config = release["config"] if scale == "full" else _merged(release["config"], release["tiny"])
    files, fields = TOKENIZERS[like](release["tokenizer_config"], scale == "full")
    return {**config, **fields}, files


def _merged(config: dict, changes: dict) -> dict:
    nested = {key: _merged(config[key], value) for key, value in changes.items() if isinstance(value, dict)}
    return {**config, **changes, **nested}


def _plan(config: dict, out: Path, label: dict) -> tuple[list[Shard], dict]:
    """Shards of at most SHARD_BYTES in table order, and the index that names them."""
    from . import family_for
    groups, size, width = [[]], 0, np.dtype("float16").itemsize if config["torch_dtype"] != "float32" else 4
    for weight in family_for(config, out).weights():
        nbytes = math.prod(weight.shape) * width
        if size + nbytes > SHARD_BYTES and groups[-1]:
            groups, size = groups + [[]], 0
        groups[-1].append(weight)
        size += nbytes
    shards = [_shard(out / f"model-{k:05}-of-{len(groups):05}.safetensors", group, config["torch_dtype"], width, label)
              for k, group in enumerate(groups, 1)]
    total = sum(math.prod(w.shape) for group in groups for w in group) * width
    return shards, {"metadata": {"total_size": total},
                    "weight_map": {w.source: shard.file.name for shard in shards for w in shard.weights}}


def _shard(file: Path, weights: list[Weight], dtype: str, width: int, label: dict) -> Shard:
    header, end = {"__metadata__": {"format": "pt", "synthetic": json.dumps(label)}}, 0
    for weight in weights:
        start, end = end, end + math.prod(weight.shape) * width
        header[weight.source] = {"dtype": DTYPE_NAMES[dtype], "shape": weight.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    packed = len(text).to_bytes(8, "little") + text
    return Shard(file, packed, weights, len(packed) + end)
