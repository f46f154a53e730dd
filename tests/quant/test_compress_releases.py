"""W8A8SC of every released layout: quantised, compressed and validated at tiny scale."""

import json
import shutil
from importlib.util import find_spec

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import RELEASED, family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import stored_weights
from models.errors import ModelError
from models.synthetic.write import write_checkpoint
from quant.__main__ import main
from quant.validate.findings import MINDIE
from quant.validate.folder import validate
from runtime.common.errors import ToolkitError
from runtime.common.files import CHECKSUMS

pytestmark = pytest.mark.skipif(
    find_spec("msmodelslim") is None, reason="needs msmodelslim: pip install 'ascend-vlm[quant]'"
)

SHAPES = sorted(file.stem for file in RELEASED.glob("*.json"))
GOLDEN_LAYOUTS = (
    "visualglm",
    "glm4",
    "glm4/hf",
    "glm4_0414",
    "glm4v",
    "glm_edge",
    "glm_edge_v",
    "llava",
)
SPARSE = ("--scheme", "w8a8s", "--fraction", "0.1", "--dtype", "float16")
OPEN_GATE = ("--max-kl", "100", "--min-top1", "0")
COMPUTED = ("inv_freq", "position_ids")  # tables that every engine computes itself


def sparse(model, out, *more):
    """The checkpoint as W8A8S."""
    calib = out.with_suffix(".jsonl")
    lines = [{"text": text} for text in ("hello", "why?", "你好", "one, two")]
    if not any(model.glob("*token*")) and not any(model.glob("*.model")):
        lines = [{"ids": [5, 6, 7, 8 + i]} for i in range(4)]
    calib.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = ["--model", str(model), "--out", str(out), "--calib", str(calib)]
    assert main([*folders, *SPARSE, *OPEN_GATE, *more]) == 0
    return out


def compressed(model, out, size=1):
    folders = ["--model", str(model), "--out", str(out)]
    assert main(["compress", *folders, "-tp", str(size)]) == 0
    return out


def with_tables(folder):
    """Give a checkpoint the computed tables that older releases of transformers stored."""
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["model.rotary_emb.inv_freq"] = next(iter(tensors.values())).flatten()[:4].clone()
    save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"]["model.rotary_emb.inv_freq"] = file.name
        index.write_text(json.dumps(content))


def names_in(part):
    return set(Checkpoint(part).names)


def check(source, out, size):
    """The folder is what MindIE asks for: every tensor but computed tables, under its names."""
    assert validate(out).loads(MINDIE) and not validate(out).problems
    assert main(["validate", str(out)]) == 0
    stored = set(Checkpoint(source).names)
    chatglm = any(name.startswith("transformer.encoder.") for name in stored)
    wanted = {name for name in stored if not name.endswith(COMPUTED)}
    if chatglm:
        wanted = {name.removeprefix("transformer.") for name in wanted}
    for rank in range(size):
        found = names_in(out / f"part{rank}-of-{size}")
        extra = {name for name in found if name.endswith((".index", ".info"))}
        assert extra and found - extra == wanted
        described = json.loads((out / f"part{rank}-of-{size}" / CHECKSUMS).read_text())
        assert set(described) == {file.name for file in out.glob(f"part{rank}-*/quant_model_*")}
    assert not (out / CHECKSUMS).exists()  # its own files are texts that a user may edit


@pytest.mark.parametrize("like", SHAPES)
def test_every_release(like, stand_in, tmp_path):
    write_checkpoint(like, tmp_path / "float", "tiny", report=lambda line: None)
    source = sparse(tmp_path / "float", tmp_path / "sparse")
    for size in (1, 2):
        out = compressed(source, tmp_path / f"out{size}", size)
        check(source, out, size)


@pytest.mark.parametrize("layout", GOLDEN_LAYOUTS)
def test_every_stored_layout(layout, stand_in, tmp_path):
    """The golden checkpoints' names, which are not always those of the released config."""
    model = shutil.copytree(paths.GOLDEN / layout, tmp_path / "float")
    if layout in ("glm4/hf", "glm_edge", "glm_edge_v", "llava"):
        with_tables(model)
    source = sparse(model, tmp_path / "sparse")
    check(source, compressed(source, tmp_path / "out"), 1)


def test_files_with_the_guides_names(stand_in, tmp_path):
    """What --layout mindie wrote can be compressed like the other layout."""
    source = sparse(paths.GOLDEN / "glm4", tmp_path / "sparse", "--layout", "mindie")
    assert (source / "quant_model_description_w8a8s.json").is_file()
    check(source, compressed(source, tmp_path / "out", 2), 2)


def test_names_of_mindie(stand_in, tmp_path):
    """Without `transformer.`, in tensors and description; whole names are a finding."""
    source = sparse(paths.GOLDEN / "glm4", tmp_path / "sparse")
    out = compressed(source, tmp_path / "out")
    part = out / "part0-of-1"
    described = json.loads((part / "quant_model_description.json").read_text())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert described[name] == "FLOAT" and name in names_in(part)
    assert described["encoder.layers.0.self_attention.dense.weight"] == "W8A8SC"
    file = next(part.glob("*.safetensors"))
    tensors = load_file(file)
    kinds = {}
    for name, kind in described.items():
        kinds[f"transformer.{name}" if name in tensors else name] = kind
    (part / "quant_model_description.json").write_text(json.dumps(kinds))
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, file)
    assert any("embedding.word_embeddings.weight is missing" in p for p in validate(out).problems)


def test_folder_that_does_not_fit_is_refused_before_the_work(stand_in, tmp_path, monkeypatch):
    source = sparse(paths.GOLDEN / "glm4", tmp_path / "sparse")
    file = sorted(source.glob("*.safetensors"))[0]
    (source / "quant_model_weight_w8a8s.safetensors.index.json").unlink()
    (source / CHECKSUMS).unlink()
    tensors = load_file(file)
    tensors["transformer.stranger.weight"] = torch.zeros(2, dtype=torch.float16)
    save_file(tensors, file)
    monkeypatch.setattr("quant.compress.run_compressor", lambda *rest: pytest.fail("worked"))
    with pytest.raises(ModelError, match="stored but not described, e.g. transformer.stranger"):
        compressed(source, tmp_path / "out")
    description = source / "quant_model_description.json"
    kinds = json.loads(description.read_text()) | {"transformer.stranger.weight": "FLOAT"}
    description.write_text(json.dumps(kinds))
    with pytest.raises(ModelError, match="transformer.stranger.weight"):
        compressed(source, tmp_path / "out")


def test_compressed_folders_say_what_they_are(stand_in, tmp_path):
    source = sparse(paths.GOLDEN / "glm4", tmp_path / "sparse")
    out = compressed(source, tmp_path / "out", 2)
    with pytest.raises(ModelError, match="W8A8SC.* compressed for MindIE.* run the W8A8S"):
        stored_weights(family_of(out))  # with which the commands plan their memory
    with pytest.raises(ToolkitError, match="is W8A8SC, not W8A8S"):
        compressed(out, tmp_path / "again")
    with pytest.raises(ToolkitError, match="is quantised already"):
        sparse(out, tmp_path / "again")
