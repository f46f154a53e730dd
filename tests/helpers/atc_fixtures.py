"""Fixtures of the ATC tests: a converted checkpoint, alone or with the files its atc command names, and an installed atc."""

import shutil

import pytest
from atc_tools import MODEL, convert, in_process, install

from convert.atc import build as om
from convert.atc import command as atc
from convert.atc import golden_features as reference
from convert.atc import run as atc_run
from convert.atc.command import Request
from convert.verify import __main__ as verify
from models import family_of


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """No CANN but what a test installs, an own cache, English, and no child process for ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(reference, "features", in_process)
        patch.setattr(
            verify, "verify", lambda family, directory, folder: verify.measure(directory, folder)
        )
        for name in (*atc_run.HOMES, "LC_ALL", "LC_MESSAGES", "STAND_IN_ATC"):
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
    """A verified ONNX artifact of one's own."""
    return shutil.copytree(converted, tmp_path / "out")


@pytest.fixture
def cann(tmp_path, monkeypatch):
    return install(tmp_path / "cann", monkeypatch)


@pytest.fixture(scope="module")
def prepared(converted, tmp_path_factory):
    """Folders with the files that the command lines name, one for each kind of graph."""
    family = family_of(MODEL)
    folders = {}
    for aipp in (False, True):
        for gears in ((), (1, 2)):
            folders[aipp, bool(gears)] = shutil.copytree(
                converted, tmp_path_factory.mktemp("prepared") / "out"
            )
            om.prepare(
                family, folders[aipp, bool(gears)], Request("Ascend910B3", aipp=aipp, gears=gears)
            )
            (folders[aipp, bool(gears)] / atc.WORK).mkdir()
    return folders
