"""`make test-versions`: which Pythons and releases it runs, and what its table says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import import_graph
import pytest
import versions
from paths import ROOT

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.fixture
def table(monkeypatch, capsys):
    """table(*arguments) -> (exit code, what is printed); no environment is made, no test runs."""
    monkeypatch.setattr(versions, "on_lowest", lambda package: sys.executable)
    monkeypatch.setattr(versions, "on_highest", lambda: sys.executable)
    monkeypatch.setattr(versions, "run_tests", lambda python, tests: (0, "7 passed"))

    def print_table(*arguments):
        monkeypatch.setattr(sys, "argv", ["versions.py", *arguments])
        return versions.main(), capsys.readouterr().out

    return print_table


@pytest.mark.parametrize("package", versions.LOWEST)
def test_the_lowest_release_is_what_setup_admits(package):
    assert f'"{package}>={versions.lowest_release(package, SETUP)}"' in SETUP.replace(",", '"')


@pytest.mark.parametrize("package", versions.LOWEST)
def test_the_tests_of_rooms_that_import_a_package_run_on_its_lowest_release(package):
    for path in import_graph.modules_of(ROOT).values():
        if package in packages_of(path):
            room = path.relative_to(ROOT).parent
            tests = {
                str(folder) for folder in (Path("tests") / room, *(Path("tests") / room).parents)
            }
            assert tests & set(versions.LOWEST[package]), room


def packages_of(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def test_what_runs_is_there():
    assert all((ROOT / test).exists() for tests in versions.LOWEST.values() for test in tests)


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


def test_a_missing_python_is_named(monkeypatch, table):
    monkeypatch.setattr(versions, "find_python", lambda version: None)
    monkeypatch.setattr(versions, "PYTHONS", ("3.9",))
    code, printed = table("--only", "3.9")
    assert code == versions.MISSING and "| Python 3.9 | missing, or" in printed
    code, printed = table("--only", "3.9", "--if-found")
    assert code == 0 and "| Python 3.9 | not on this machine |" in printed


def test_an_environment_that_cannot_be_made(monkeypatch, table):
    def fail(package):
        raise subprocess.CalledProcessError(1, ["python", "-m", "venv"])

    monkeypatch.setattr(versions, "on_lowest", fail)
    code, printed = table("--only", "onnx")
    assert code == versions.MISSING and "its packages cannot be installed" in printed


def test_a_row_says_what_ran(table):
    code, printed = table("--only", "onnx")
    assert code == 0
    assert "| lowest onnx | Python 3." in printed and "numpy " in printed
    assert "tests/convert" in printed and "| 7 passed |" in printed
    assert "| tests/models | 7 passed |" in table("--only", "onnx", "--", "tests/models")[1]


def test_nothing_higher_is_not_run_again(table):
    code, printed = table("--only", "highest")
    assert code == 0 and "the releases of this environment" in printed


def test_a_failed_test_fails_the_run(monkeypatch, table):
    monkeypatch.setattr(versions, "run_tests", lambda python, tests: (1, "1 failed"))
    assert table("--only", "onnx", "numpy")[0] == versions.FAILED
