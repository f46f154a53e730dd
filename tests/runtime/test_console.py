"""`ascend-vlm COMMAND`: the same commands as `python -m`, and nothing imported from the current folder."""

import importlib.util
import os
import subprocess
import sys

import pytest
from demo_model import DEMO
from paths import ROOT

from runtime import console

# what pip writes for the entry point
SCRIPT = f"#!{sys.executable}\nimport sys\nfrom runtime.console import main\nsys.exit(main())\n"
SHADOWED = ("torch", "numpy", "json", "logging", "runpy", "safetensors", "PIL", "jinja2")


@pytest.fixture
def script(tmp_path):
    script = tmp_path / "bin" / "ascend-vlm"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    return script


@pytest.fixture
def strangers_folder(tmp_path):
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit(99)\n")
    for file in DEMO.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def run(script, *arguments, cwd, path=str(ROOT)):
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("path", [str(ROOT), f"{ROOT}{os.pathsep}"])
def test_a_strangers_modules_do_not_run(path, script, strangers_folder):
    """An empty part of PYTHONPATH stands for the current folder, too. -tp 2 starts a second process,
    a template a third."""
    asked = ["chat", "--model", ".", "--prompt", "hi", "--max-tokens", "2", "--vision", "torch"]
    done = run(script, *asked, "-tp", "2", cwd=strangers_folder, path=path)
    assert done.returncode == 0, done.stderr
    assert not (strangers_folder / "ran").exists()


def test_python_m_runs_them(strangers_folder):
    """Why the script exists; where Python itself changes this, README is to be changed."""
    asked = [sys.executable, "-m", "runtime.chat", "--model", ".", "--prompt", "hi"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    env["PYTHONPATH"] = str(ROOT)
    subprocess.run(asked, cwd=strangers_folder, env=env, capture_output=True)
    assert (strangers_folder / "ran").exists()


def test_the_exit_codes_are_those_of_the_commands(script, tmp_path):
    done = run(script, "chat", "--model", "nowhere", "--prompt", "hi", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model nowhere does not exist")
    done = run(script, "walk", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: walk is no command: use one of chat, serve,")


def test_help(script, tmp_path):
    assert run(script, cwd=tmp_path).stdout == console.USAGE
    own = run(script, "quant", "--help", cwd=tmp_path).stdout
    assert own == (ROOT / "tests/help/quant.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_exists(name):
    assert importlib.util.find_spec(console.COMMANDS[name])


def test_the_distribution_has_the_script():
    assert '"ascend-vlm = runtime.console:main"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_standing_in_the_checkout_leaves_the_path_as_it_is(monkeypatch):
    before = [*sys.path]
    monkeypatch.setattr(sys, "path", before)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(ROOT)
    console.leave_current_folder_out()
    assert sys.path == before


PLOTS = """
from pathlib import Path
from runtime.bench.page import write_plot
from runtime.compare.report.plots import draw_lines, svg
assert "<svg" in svg(draw_lines, [[1e-3, 1e-2]])
write_plot([], Path("plot.png"))
"""


def test_a_strangers_matplotlibrc_is_not_obeyed(tmp_path):
    """matplotlib reads it from the current folder; text.usetex would start LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: module://stranger\n")
    (tmp_path / "stranger.py").write_text("open('ran', 'w')")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PLOTS], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
