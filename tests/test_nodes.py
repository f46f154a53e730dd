"""Exported encoders against torch from the inside: clean ones pass, a planted error is named by node and module."""
import csv
import shutil
from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file

from convert import nodes
from convert.__main__ import main as convert
from models import family_of
from runtime.errors import run_command

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Family -> its exported encoder, made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            assert run_command(convert, ["--model", str(GOLDEN / family), "--out", str(made[family])]) == 0
        return made[family]
    return make


def run(model, artifact, tmp_path, *more):
    """(exit code, rows of the table)"""
    out = tmp_path / "n.csv"
    code = run_command(nodes.main, ["--model", str(model), "--artifact", str(artifact), "--out", str(out), *more])
    return code, list(csv.DictReader(out.read_text(encoding="utf-8").splitlines())) if out.exists() else []


@pytest.mark.parametrize("family", ["visualglm", "glm4v", "llava", "glm_edge_v"])
def test_clean_export_and_one_scaled_weight(family, artifacts, tmp_path, capsys):
    code, table = run(GOLDEN / family, artifacts(family), tmp_path)
    assert code == 0 and len(table) > 20 and table[-1]["IsOutputNode"] == "YES"
    modules = [row["GroundTruth"] for row in table]
    weights = [w for w in family_of(GOLDEN / family).weights() if len(w.parts) == 1
               and w.parts[0].target.startswith("vision.") and w.parts[0].target.endswith("mlp.down.weight")]
    victim = weights[0]
    copy = tmp_path / "scaled"
    shutil.copytree(GOLDEN / family, copy, ignore=shutil.ignore_patterns("hf", "*.npz"))
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        if victim.source in tensors:
            tensors[victim.source] = (tensors[victim.source].float() * 1.01).to(tensors[victim.source].dtype)
            save_file(tensors, path, {"format": "pt"})
    code, table = run(copy, artifacts(family), tmp_path)
    first = next(row for row in table if row["IsPrecisionError"] == "YES")
    expected = victim.parts[0].target.removeprefix("vision.").removesuffix(".weight")
    assert code == 1 and first["GroundTruth"] == expected and expected in modules
    assert f"torch module {expected}) is the first node that departs" in capsys.readouterr().out


@pytest.mark.parametrize("pieces", [1 << 30, 1])
@pytest.mark.parametrize("operator, edit, module", [
    ("LayerNormalization", lambda node: setattr(node.attribute[1], "f", 0.1), "tower.blocks.0.attention_norm"),
    ("Sigmoid", lambda node: setattr(node, "op_type", "Tanh"), "tower.blocks.1.mlp.down"),
    ("Softmax", lambda node: setattr(node.attribute[0], "i", 1), "tower.blocks.1.attention.out")])
def test_a_wrong_node(operator, edit, module, pieces, artifacts, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "PIECE", pieces)
    folder = tmp_path / "copy"
    shutil.copytree(artifacts("llava"), folder)
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    victim = [n for n in model.graph.node if n.op_type == operator][1]
    edit(victim)
    (folder / "vision.onnx").write_bytes(model.SerializeToString())
    code, table = run(GOLDEN / "llava", folder, tmp_path)
    first = next(row for row in table if row["IsPrecisionError"] == "YES")
    assert code == 1 and first["GroundTruth"] == module
    assert not (folder / "piece.onnx").exists()


@pytest.mark.parametrize("given, sentence", [
    (["--model", str(GOLDEN / "glm4")], "is a text model"), (["--artifact", "/nowhere"], "there is no vision.onnx"),
    (["--limit", "0"], "more than 0 is needed"), (["--image", "none.png"], "none.png")])
def test_mistakes(given, sentence, artifacts, tmp_path, capsys):
    assert run(GOLDEN / "llava", artifacts("llava"), tmp_path, *given)[0] == 2
    assert sentence in capsys.readouterr().err


def test_an_artifact_of_another_model(artifacts, tmp_path):
    assert run(GOLDEN / "visualglm", artifacts("llava"), tmp_path)[0] == 1
