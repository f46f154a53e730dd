"""What the tests that plant errors share."""

import json
import shutil

from safetensors.torch import load_file, save_file


def edited(model, tmp_path, edit, config=None):
    """A copy of the checkpoint with edit(tensors), its config.json with config(config)."""
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
