"""The command lines of MindIE's GLM-4-9B guide, as typed after `python -m quant`."""

import json
from importlib.util import find_spec

import paths
import pytest
import torch
from safetensors.torch import load_file

from quant.__main__ import main
from quant.options import translated
from quant.validate.findings import MINDIE
from quant.validate.folder import validate
from runtime import Engine
from runtime.common.errors import ToolkitError

pytestmark = pytest.mark.skipif(
    find_spec("msmodelslim") is None, reason="needs msmodelslim: pip install 'ascend-vlm[quant]'"
)

GLM = str(paths.GOLDEN / "glm4")
OPEN_GATE = ("--max-kl", "100", "--min-top1", "0")


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    file = tmp_path_factory.mktemp("calib") / "civil_servant.jsonl"
    texts = ("hello", "why?", "你好", "one, two")
    file.write_text("".join(json.dumps({"inputs_pretokenized": t}) + "\n" for t in texts))
    return str(file)


def description(folder):
    return json.loads((folder / "quant_model_description.json").read_text())


def test_source_and_destination(calib, tmp_path, capsys):
    """-trust_remote_code is accepted and said to be ignored."""
    words = ["-src", GLM, "-dst", str(tmp_path / "out"), "-trust_remote_code", "--calib", calib]
    assert main([*words, *OPEN_GATE]) == 0
    assert description(tmp_path / "out")["model_quant_type"] == "W8A8"
    assert "no code of a checkpoint is ever run" in capsys.readouterr().err


@pytest.mark.parametrize("kind, scheme", [("glm4_9b_w8a16", "W8A16"), ("glm4_9b_w8a8", "W8A8")])
def test_type(kind, scheme, calib, tmp_path):
    words = ["-src", GLM, "-dst", str(tmp_path / "out"), "-type", kind, "--calib", calib]
    assert main([*words, *OPEN_GATE]) == 0
    assert description(tmp_path / "out")["model_quant_type"] == scheme


def test_sparse_form(calib, tmp_path, capsys):
    out = tmp_path / "w8a8s"
    words = [GLM, str(out), calib, "2", "0", "0,1", "-trust_remote_code"]
    assert main([*words, "--fraction", "0.1", *OPEN_GATE]) == 0
    assert description(out)["model_quant_type"] == "W8A8S"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    said = capsys.readouterr().err
    assert f"python -m quant compress --model {out} --out {out}c -tp 2" in said


def test_spellings_with_an_equals_sign():
    given = ["-src=a=b", "-dst=c", "-type=glm4_9b_w8a8s", "--calib=x=y", "-trust_remote_code"]
    assert translated(given) == [
        *("--model", "a=b", "--out", "c", "--scheme", "w8a8s"),
        *("--calib=x=y", "-trust_remote_code"),
    ]


@pytest.mark.parametrize("count", [2, 5, 7])
def test_other_numbers_of_words(count):
    with pytest.raises(ToolkitError, match=f"{count} words without a flag.*SRC W8A8S_DST CALIB"):
        main(["x"] * count)


@pytest.mark.parametrize("size", ["3", "two"])
def test_ranks_that_cannot_be(size, tmp_path):
    """Told before the first half's work, not by the second half."""
    with pytest.raises(ToolkitError, match=f"TP is '{size}': use one of 1, 2, 4, 8"):
        main([GLM, str(tmp_path / "o"), "calib.jsonl", size, "0", "0,1", "-trust_remote_code"])


def test_names_of_the_guide(calib, tmp_path):
    """One file, with the tensors that shards have."""
    arguments = ["--model", GLM, "--calib", calib, *OPEN_GATE]
    assert main([*arguments, "--out", str(tmp_path / "many")]) == 0
    one = tmp_path / "one"
    assert main([*arguments, "--out", str(one), "--layout", "mindie"]) == 0
    assert {file.name for file in one.glob("quant_model*")} == {
        "quant_model_weight_w8a8.safetensors",
        "quant_model_description_w8a8.json",
    }
    whole = load_file(one / "quant_model_weight_w8a8.safetensors")
    shards = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        shards |= load_file(file)
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    found = validate(one)
    assert found.loads(MINDIE) and not found.problems
    Engine(one, max_model_len=64)
