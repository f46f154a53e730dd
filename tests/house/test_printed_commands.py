"""Commands that are printed can be pasted into a shell, whatever the folder is called."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import paths
import pytest

from convert.atc.command import OmRequest
from convert.atc.plan import next_step
from models import family_of
from models.synthetic.__main__ import main as synthetic
from quant import pipeline
from runtime.common.errors import ToolkitError
from runtime.compare.layers.float_search import report
from runtime.vision import artifact

FOLDER = Path("/my models/it's (1)")


def words_of(text: str, start: str) -> list[str]:
    """The words that a shell makes of a command in a text, which begins with `start` and ends with
    its line, or with the quotation mark before it."""
    begin = text.index(start)
    end = "`" if text[begin - 1 : begin] == "`" else "\n"
    return shlex.split(text[begin:].partition(end)[0])


def test_convert():
    request = OmRequest("Ascend910B3", "auto", False, (), {})
    text = next_step(family_of(paths.GOLDEN / "glm_edge_v"), FOLDER, request)
    assert words_of(text, "sh ") == ["sh", f"{FOLDER}/atc.sh"]


def test_quant(capsys):
    figures = SimpleNamespace(kl=0.1, top1=1.0, tokens=5)
    verdict = SimpleNamespace(figures=figures, float_groups=[])
    plan = SimpleNamespace(scheme=SimpleNamespace(kind="W8A8"))
    pipeline.print_summary(FOLDER, plan, verdict)
    words = words_of(capsys.readouterr().out, "python -m runtime.chat")
    assert words == ["python", "-m", "runtime.chat", "--model", str(FOLDER)]


def test_an_artifact_of_another_version():
    family = SimpleNamespace(name="glm-edge")
    checkpoint = SimpleNamespace(directory=FOLDER)
    source = SimpleNamespace(family=family, checkpoint=checkpoint, hash="")
    manifest = SimpleNamespace(exporter=-1, family="glm-edge", source="")
    with pytest.raises(ToolkitError) as error:
        artifact.check_fits(manifest, source, FOLDER / "a b")
    words = words_of(str(error.value), "python -m convert")
    assert words[:4] == ["python", "-m", "convert", "--model"]
    assert words[4:] == [str(FOLDER), "--out", f"{FOLDER}/a b"]


def test_synthetic(tmp_path, capsys):
    out = tmp_path / "a b"
    assert synthetic(["--like", "glm-edge-v-2b", "--scale", "tiny", "--out", str(out)]) == 0
    words = words_of(capsys.readouterr().out, "python -m convert")
    assert words == ["python", "-m", "convert", "--model", str(out), "--out", "ARTIFACT"]


def test_flags_of_compare():
    found = report(None, ["layers.* (1)"], 1, True)
    assert shlex.split(found["flags"]) == ["--keep-dtype", "layers.* (1)"]
