"""The files of a quantised folder beside its weights, and the folder's publication.

Takes what the folder is about, returns the texts of its description and config.json, or the names
of copied files. `publish` puts the description, without which nothing loads, in place last.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from models.checkpoint.quantized import FILE

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


def write_description(kinds: dict[str, str], kind: str) -> str:
    """quant_model_description.json. kinds: of every tensor, by name. kind: of the folder."""
    return json.dumps({"model_quant_type": kind, "version": "1.0.0", **kinds}, indent=2) + "\n"


def write_config(config: dict, kind: str, dtype: torch.dtype) -> str:
    """config.json with what the engines look for: `quantize` (MindIE), `torch_dtype` and `dtype`
    (old and new spelling)."""
    name = str(dtype).removeprefix("torch.")
    changed = config | {"quantize": kind.lower(), "torch_dtype": name, "dtype": name}
    return json.dumps(changed, indent=2, ensure_ascii=False) + "\n"


def copy_small_files(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, processor, generation_config, the release's code: everything but weights and
    config.json."""
    names = []
    for file in sorted(source.iterdir()):
        left_out = file.name.startswith(".") or file.name.endswith(WEIGHTS)
        if file.is_file() and not left_out and file.name != "config.json":
            names.append(file.name)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def publish(folder: Path, out: Path, names: list[str]):
    """Move finished files into `out`, the description last."""
    (out / FILE).unlink(missing_ok=True)
    others = [name for name in names if name != FILE]
    for name in [*others, FILE]:
        os.chmod(folder / name, 0o644)
        os.replace(folder / name, out / name)
