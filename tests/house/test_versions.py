"""`make test-versions`: which Pythons and which lowest releases it runs."""

import os
import sys

import pytest
import versions
from paths import ROOT

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", versions.LOWEST)
def test_the_lowest_release_is_what_setup_admits(package):
    assert f'"{package}>={versions.lowest_release(package, SETUP)}"' in SETUP.replace(",", '"')


def test_a_python_is_found_in_path_or_among_pyenvs(tmp_path, monkeypatch):
    major, minor, *_ = sys.version_info
    own = f"{major}.{minor}"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert versions.find_python(own) is None
    folder = tmp_path / "pyenv/versions" / f"{own}.1" / "bin"
    folder.mkdir(parents=True)
    os.symlink(sys.executable, folder / "python")
    assert versions.find_python(own) == str(folder / "python")


def test_a_missing_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr(versions, "find_python", lambda version: None)
    monkeypatch.setattr(sys, "argv", ["versions.py", "--only", "3.9"])
    monkeypatch.setattr(versions, "PYTHONS", ("3.9",))
    assert versions.main() == versions.MISSING
    assert "| Python 3.9 | missing, or" in capsys.readouterr().out
