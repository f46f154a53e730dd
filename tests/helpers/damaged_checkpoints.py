"""Copies of checkpoints with planted errors."""

import json
import shutil

from safetensors.torch import load_file, save_file


def edited(model, tmp_path, edit, config=None):
    """Copies the checkpoint; edit(tensors) changes every shard in place, config(values) its config.json."""
    copy = tmp_path / "edited"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("hf", "*.npz"))
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, {"format": "pt"})
    stored = json.loads((copy / "config.json").read_text())
    (config or dict)(stored)
    (copy / "config.json").write_text(json.dumps(stored))
    return copy
