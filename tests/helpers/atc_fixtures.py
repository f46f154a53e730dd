"""Fixtures of the ATC tests: a converted checkpoint, the files that its atc command names, and an installed atc."""

import shutil

import pytest
from atc_tools import MODEL, convert, in_process, install

from convert import pipeline
from convert.atc import golden_features
from convert.atc.command import ATC_WORK, OmRequest
from convert.atc.inputs import write_atc_inputs
from convert.atc.run import HOMES
from convert.verify.verification import measure
from models import family_of


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """An environment without CANN, in English, with a cache of its own and ONNX Runtime in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(golden_features, "features", in_process)
        patch.setattr(
            pipeline, "verify", lambda family, onnx_dir: measure(family.directory, onnx_dir)
        )
        for name in (*HOMES, "LC_ALL", "LC_MESSAGES", "STAND_IN_ATC"):
            patch.delenv(name, raising=False)
        patch.setenv("LANG", "en_US.UTF-8")
        patch.setenv("PATH", "/usr/bin:/bin")
        yield


@pytest.fixture(scope="module")
def converted(surroundings, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    code, text = convert(out)
    assert code == 0 and "where CANN is installed" in text, text
    return out


@pytest.fixture
def out(converted, tmp_path):
    """A verified ONNX artifact that the test may change."""
    return shutil.copytree(converted, tmp_path / "out")


@pytest.fixture
def cann(tmp_path, monkeypatch):
    return install(tmp_path / "cann", monkeypatch)


@pytest.fixture(scope="module")
def prepared(converted, tmp_path_factory):
    """{(aipp?, gears?): artifact with the files that its atc command names}."""
    family = family_of(MODEL)
    folders = {}
    for aipp in (False, True):
        for gears in ((), (1, 2)):
            folder = shutil.copytree(converted, tmp_path_factory.mktemp("prepared") / "out")
            write_atc_inputs(family, folder, OmRequest("Ascend910B3", aipp=aipp, gears=gears))
            (folder / ATC_WORK).mkdir()
            folders[aipp, bool(gears)] = folder
    return folders
