"""convert --no-verify: the artifact says that it was never compared with torch, until it was."""

import contextlib
import io
import json
from dataclasses import replace

import paths
import pytest

from convert.__main__ import main
from convert.atc.build import remove_om_record
from models import family_of
from models.checkpoint import Checkpoint
from runtime.common.errors import run_command
from runtime.common.notes import notes_on_stderr
from runtime.compare import __main__ as compare
from runtime.vision import artifact, open_session

GOLDEN = paths.GOLDEN / "visualglm"
COMPARED = ["--image", str(GOLDEN / "image.png"), "--prompt", "你好", "--max-tokens", "2"]


def run(command, *arguments) -> tuple[int, str]:
    """(exit code, everything printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_command(command, ["--model", str(GOLDEN), *map(str, arguments)])
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def unverified(tmp_path_factory):
    """(artifact folder, what convert printed)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("convert.atc.run.find_atc", lambda: None)
        out = tmp_path_factory.mktemp("artifact") / "a b"
        code, text = run(main, "--out", out, "--no-verify")
        assert code == 0, text
        yield out, text


@pytest.fixture(autouse=True)
def as_made(unverified):
    """The manifest is put back after every test."""
    made = artifact.read_manifest(unverified[0])
    yield
    artifact.save(unverified[0], made)


def opened(folder, capsys) -> tuple:
    """(session, what was noted when it was opened)."""
    with notes_on_stderr():
        session = open_session("onnx", family_of(GOLDEN), Checkpoint(GOLDEN), folder)
    return session, capsys.readouterr().err


def test_it_is_marked_and_said_when_loaded(unverified, capsys):
    folder, text = unverified
    assert "ONNX not verified (--no-verify): " in text and "cosine" not in text
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "onnx not verified" and manifest["errors"] == {}
    session, noted = opened(folder, capsys)
    assert "was never compared with torch (convert --no-verify): `python -m convert" in noted
    assert f"--out '{folder}'` does that" in noted
    assert session.describe().endswith(", not compared with torch")


def test_the_same_command_without_the_flag_verifies_what_is_there(unverified, capsys):
    folder, _ = unverified
    before = (folder / artifact.DATA).stat().st_mtime_ns
    code, text = run(main, "--out", folder)
    assert code == 0 and "not verified yet" in text and "verify scene: cosine 1.0" in text, text
    assert "ONNX verified: " in text and (folder / artifact.DATA).stat().st_mtime_ns == before
    manifest = artifact.load(folder)
    assert manifest.status == "onnx verified" and set(manifest.errors) == {"scene", "noise"}
    session, noted = opened(folder, capsys)
    assert not noted and "not compared" not in session.describe()


def test_a_passing_compare_verifies(unverified, tmp_path, capsys):
    folder, _ = unverified
    asked = [*COMPARED, "--artifact", folder, "--out", tmp_path / "report"]
    code, text = run(compare.main, *asked)
    assert code == 0 and f"{folder} passed, and counts as verified from now on" in text, text
    manifest = artifact.load(folder)
    assert manifest.status == "onnx verified"
    assert manifest.errors["runtime.compare"]["cosine"] > 0.9999
    assert not opened(folder, capsys)[1]
    assert "counts as verified" not in run(compare.main, *asked)[1]


@pytest.mark.parametrize("more", [["--limit", "decode.cosine_min=2"], ["--vision", "torch"]])
def test_other_compares_do_not(unverified, tmp_path, more):
    """One that fails, and one that never used the artifact."""
    folder, _ = unverified
    code, text = run(
        compare.main, *COMPARED, "--artifact", folder, "--out", tmp_path / "report", *more
    )
    assert code == (1 if "--limit" in more else 0) and "counts as verified" not in text, text
    assert artifact.read_manifest(folder).status == "onnx not verified"


def test_a_compiled_om_keeps_the_mark(unverified):
    """The record of an .om is removed again: the ONNX below is still not verified."""
    folder, _ = unverified
    manifest = replace(artifact.read_manifest(folder), status=artifact.OM_COMPILED)
    artifact.save(folder, manifest)
    assert remove_om_record(folder).status == "onnx not verified"
