"""Synthetic checkpoints: a released layout at real shapes with random weights, to rehearse before downloading.

    python -m models.synthetic --like visualglm-6b --out DIR [--scale full|tiny] [--seed 0]

A release's config (models/released/*.json) flows in; names and shapes come from the family's own weight table;
safetensors shards, index, tokenizer and config.json flow out. Tensors are streamed in small blocks and seeded one by
one, so that the bytes do not depend on where a run was interrupted. Finished shards are kept; index and config.json
come last.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.family import ModelError, Weight, read_json

RELEASED = Path(__file__).parents[1] / "released"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 20                 # normal values drawn per tensor; a larger tensor repeats them, rotated at random
SPREAD = 0.02                   # standard deviation of matrices and biases, and of norm weights around 1


def visualglm_files(tokenizer_config: dict, full: bool) -> tuple[dict[str, bytes], dict]:
    """Tokenizer files {name: bytes}, and the config fields that follow from them."""
    import sentencepiece

    from .tokenizer_files import ice_text
    vocabulary = ice_text(base_pieces=130000 if full else None)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    special = {"bos_token_id": "<sop>", "eos_token_id": "<eop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}
    fields = {field: pieces.piece_to_id(piece) for field, piece in special.items()}
    return {"ice_text.model": vocabulary, "tokenizer_config.json": _json(tokenizer_config)}, fields


def glm4_files(tokenizer_config: dict, full: bool, json_file: bool = False,
               released: int = 151329) -> tuple[dict[str, bytes], dict]:
    """`tokenizer.model` of the `chatglm` layout or, with `json_file`, `tokenizer.json`: the same `released` pieces (291
    for tiny) and the special ones behind them.
    """
    from models.families.glm4 import SPECIAL

    from .tokenizer_files import byte_pieces, json_file_of, rank_lines
    pieces = byte_pieces(released if full else 291)
    ids = {piece: len(pieces) + i for i, piece in enumerate(SPECIAL)}
    added = {str(token_id): {"content": piece, "special": True} for piece, token_id in ids.items()}
    files = {"tokenizer_config.json": _json({"added_tokens_decoder": added} | tokenizer_config)}
    files |= {"tokenizer.json": json_file_of(pieces, SPECIAL)} if json_file else {"tokenizer.model": rank_lines(pieces)}
    eos = [ids[piece] for piece in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    return files, {"eos_token_id": eos, "pad_token_id": eos[0]}


def glm4v_files(tokenizer_config: dict, full: bool, **kind) -> tuple[dict[str, bytes], dict]:
    """As GLM-4's; the begin and end marks of a picture follow <|observation|>."""
    files, fields = glm4_files(tokenizer_config, full, **kind)
    last = fields["eos_token_id"][-1]
    return files, fields | {"boi_token_id": last + 1, "eoi_token_id": last + 2}


def llava_files(tokenizer_config: dict, full: bool) -> tuple[dict[str, bytes], dict]:
    """LLaMA's 32,000 pieces (480 for tiny), <image> and <pad>."""
    from .tokenizer_files import llama_file
    count = 32000 if full else 480
    files = {"tokenizer.json": llama_file(count, ("<image>", "<pad>"))}
    files["tokenizer_config.json"] = _json(tokenizer_config)
    return files, {"image_token_index": count, "pad_token_id": count + 1}


GLM_EDGE = {"json_file": True, "released": 59246}
RELEASES = {        # name of the file in released/ -> who makes its tokenizer
    "visualglm-6b": visualglm_files,
    "glm-4-9b-chat": glm4_files,
    "glm-4-9b-chat-hf": functools.partial(glm4_files, json_file=True),
    "glm-4v-9b": glm4v_files,
    "llava-1.5-7b": llava_files,
    "glm-edge-1.5b-chat": functools.partial(glm4_files, **GLM_EDGE),
    "glm-edge-4b-chat": functools.partial(glm4_files, **GLM_EDGE),
    "glm-edge-v-2b": functools.partial(glm4v_files, **GLM_EDGE),
    "glm-edge-v-5b": functools.partial(glm4v_files, **GLM_EDGE),
}


@dataclass(frozen=True)
class Shard:
    """A file to write, `size` bytes: `header` (safetensors, its length in front), then the tensors in order."""
    file: Path
    header: bytes
    weights: list[Weight]
    size: int

    @property
    def finished(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.size and self._start() == self.header

    @property
    def foreign(self) -> bool:
        return self.file.exists() and b'"synthetic"' not in self._start()

    def _start(self) -> bytes:
        with open(self.file, "rb") as stream:
            return stream.read(len(self.header))


def write_checkpoint(like: str, out: str | Path, scale: str = "full", seed: int = 0, report=print,
                     progress: Callable[[int, int], None] = lambda done, total: None, changes: dict | None = None) -> None:
    """Write the checkpoint of release `like` into `out`, going on where an interrupted run stopped.

    `changes` of the release's config, e.g. {"num_layers": 1}. `report(line)` gets the plan, `progress(done, total)` counts
    bytes. Raises ModelError when `out` holds other files or the disk is too small.
    """
    out, (config, files) = Path(out), _release(like, scale)
    config = _merged(config, changes or {})
    shards, index = _plan(config, out, {"like": like, "scale": scale, "seed": seed})
    manifest = {INDEX: _json(index), "config.json": _json(config)}
    _prepare(out, shards, files | manifest, report)
    for name, content in files.items():
        _write(out / name, [content])
    total, done = sum(shard.size for shard in shards), 0
    for shard in shards:
        if not shard.finished:
            blocks = _blocks(shard, config["torch_dtype"], seed)
            _write(shard.file, blocks, lambda written, before=done: progress(before + written, total))
        done += shard.size
        progress(done, total)
    for name, content in manifest.items():
        _write(out / name, [content])


def _release(like: str, scale: str) -> tuple[dict, dict[str, bytes]]:
    """config.json as a dict, and the tokenizer files."""
    release = read_json(RELEASED / f"{like}.json")
    config = release["config"] if scale == "full" else _merged(release["config"], release["tiny"])
    files, fields = RELEASES[like](release["tokenizer_config"], scale == "full")
    return config | fields, files


def _merged(config: dict, changes: dict) -> dict:
    return config | {key: _merged(config[key], value) if isinstance(value, dict) else value
                     for key, value in changes.items()}


def _plan(config: dict, out: Path, label: dict) -> tuple[list[Shard], dict]:
    """Shards of at most SHARD_BYTES, tensors in table order, and the index that names them."""
    import torch

    from models import known_families
    family = next(family for family in known_families() if family.matches(config))
    dtype, groups, size = getattr(torch, config["torch_dtype"]), [[]], 0
    for weight in family(out, config).weights():
        nbytes = math.prod(weight.shape) * dtype.itemsize
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups, size = [*groups, []], 0
        groups[-1].append(weight)
        size += nbytes
    shards = [_shard(out / f"model-{k:05}-of-{len(groups):05}.safetensors", group, dtype, label)
              for k, group in enumerate(groups, 1)]
    return shards, {"metadata": {"total_size": sum(shard.size - len(shard.header) for shard in shards)},
                    "weight_map": {weight.source: shard.file.name for shard in shards for weight in shard.weights}}


def _shard(file: Path, weights: list[Weight], dtype, label: dict) -> Shard:
    from models.checkpoint.shards import SAFETENSORS_DTYPES
    stored = {ours: name for name, ours in SAFETENSORS_DTYPES.items()}[dtype]
    header, end = {"__metadata__": {"format": "pt", "synthetic": json.dumps(label)}}, 0
    for weight in weights:
        start, end = end, end + math.prod(weight.shape) * dtype.itemsize
        header[weight.source] = {"dtype": stored, "shape": weight.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                                     # tensors start aligned
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, weights, len(header) + end)


def _prepare(out: Path, shards: list[Shard], others: Iterable[str], report) -> None:
    """Refuse a directory with other files and a disk too small; then nothing in `out` may look whole any more."""
    from rich.filesize import decimal
    ours = {shard.file.name for shard in shards} | set(others)
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out} is a file; choose another --out")
    foreign = [file.name for file in out.glob("*") if file.name.removesuffix(".part") not in ours]
    foreign += [shard.file.name for shard in shards if shard.foreign]
    if foreign:
        raise ModelError(f"{out} holds files of something else ({foreign[0]}); choose an empty directory as --out")
    need = sum(shard.size for shard in shards if not shard.finished)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    report(f"{decimal(need)} to write to {out}, {decimal(free)} free on its disk")
    if need > free:
        raise ModelError(f"{out} needs {decimal(need)}, its disk has {decimal(free)} free; "
                         "free some space or choose another --out")
    if need:
        for name in (INDEX, "config.json"):
            (out / name).unlink(missing_ok=True)


def _blocks(shard: Shard, dtype: str, seed: int) -> Iterator[bytes | memoryview]:
    yield shard.header
    for weight in shard.weights:
        yield from _tensor_blocks(weight, dtype, seed)


def _tensor_blocks(weight: Weight, dtype: str, seed: int) -> Iterator[memoryview]:
    """Bytes of one tensor: N(0, 0.02), norm weights around 1; they depend on the seed and the name only."""
    import torch
    count, dtype = math.prod(weight.shape), getattr(torch, dtype)
    random = np.random.default_rng([seed, *hashlib.sha256(weight.source.encode()).digest()])
    values = random.standard_normal(min(count, BLOCK), dtype=np.float32) * SPREAD
    if len(weight.shape) == 1 and weight.source.endswith(".weight"):
        values += 1
    twice = torch.from_numpy(np.concatenate((values, values))).to(dtype).view(torch.uint8).numpy()
    for start in range(0, count, BLOCK):
        first = int(random.integers(len(values))) * dtype.itemsize
        yield twice[first:first + min(BLOCK, count - start) * dtype.itemsize].data


def _write(file: Path, blocks: Iterable[bytes | memoryview], progress=lambda written: None) -> None:
    """Write under another name, then rename: `file` is complete or not there."""
    part, written = file.with_name(file.name + ".part"), 0
    try:
        with open(part, "wb") as stream:
            for block in blocks:
                written += stream.write(block)
                progress(written)
        os.replace(part, file)
    except OSError as error:
        raise ModelError(f"{file} cannot be written ({error.strerror}); finished shards are kept, "
                         "run the same command again to go on") from None
    finally:
        part.unlink(missing_ok=True)


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.synthetic", description="Write a checkpoint in a released "
                                     "layout with random weights. An interrupted run goes on where it stopped.")
    parser.add_argument("--like", required=True, choices=sorted(RELEASES), help="the release to imitate")
    parser.add_argument("--out", required=True, help="directory to write, new or empty")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="real shapes, or small ones (1 MB)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all weights (default 0)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 0, or 2 for a user mistake."""
    options = _parser().parse_args(arguments)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    columns = TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns) as bar:
            task = bar.add_task("", total=None)
            write_checkpoint(options.like, options.out, options.scale, options.seed, bar.console.print,
                             lambda done, total: bar.update(task, completed=done, total=total))
    except (ModelError, OSError, KeyboardInterrupt) as error:       # `models` may not import runtime's run_command
        if options.debug:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        message = "interrupted; run the same command again to go on" if interrupted else error
        print(f"error: {message}", file=sys.stderr)
        return 130 if interrupted else 2
    print(f"{options.out} is a complete checkpoint; next: python -m convert --model {options.out} --out ARTIFACT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
