"""Fixtures of the ATC tests: a converted checkpoint, the files that its atc command names, and an installed atc."""

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
    """An environment without CANN, in English, with a cache of its own and ONNX Runtime in this process."""
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
            om.prepare(family, folder, Request("Ascend910B3", aipp=aipp, gears=gears))
            (folder / atc.WORK).mkdir()
            folders[aipp, bool(gears)] = folder
    return folders
