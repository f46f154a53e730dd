"""The files of a quantised folder beside its weights, and the folder's publication.

Takes what the folder is about, returns the texts of its description and config.json, or the names
of copied files. `publish` puts the description, without which nothing loads, in place last.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from models.files import new_file, open_inside
from runtime.common.files import CHECKSUMS

RESULT = "quant_model_"  # how the names of msmodelslim's own files begin
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


def small_files(source: Path) -> list[str]:
    """Names of tokenizer, processor, generation_config, the release's code: everything but weights
    and config.json. ModelError for a link that leaves the checkpoint, or for a named pipe."""
    names = []
    for file in sorted(source.iterdir()):
        left_out = file.name.startswith(".") or file.name.endswith(WEIGHTS)
        if not file.is_dir() and not left_out and file.name not in ("config.json", CHECKSUMS):
            open_inside(source, file.name).close()
            names.append(file.name)
    return names


def copy_small_files(source: Path, folder: Path) -> list[str]:
    """Copies `small_files` of a checkpoint into the folder; their names."""
    names = small_files(source)
    for name in names:
        with open_inside(source, name) as stream, new_file(folder / name, durable=False) as copy:
            shutil.copyfileobj(stream, copy)
    return names


def checked(names: list[str]) -> list[str]:
    """Of a result's files those of which checksums.json has the sha256: weights, their index and the
    description. The others (config, tokenizer, template, report) are texts that a user may edit."""
    return [name for name in names if name.startswith(RESULT)]


def publish(folder: Path, out: Path, names: list[str]):
    """Move finished files into `out` in this order; the last is the description, without which
    nothing loads."""
    for name in names:
        os.chmod(folder / name, 0o644)
        os.replace(folder / name, out / name)
