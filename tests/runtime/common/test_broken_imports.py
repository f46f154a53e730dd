"""Imports that fail for want of room for thread-local data, as on aarch64: every command says what to
type."""

import os
import subprocess
import sys

import paths
import pytest

from runtime.common import broken_imports
from runtime.common.errors import run_command

MESSAGE = "/v/torch.libs/libgomp-d22c30c5.so.1: cannot allocate memory in static TLS block"
LINE = "export LD_PRELOAD=/v/torch.libs/libgomp-d22c30c5.so.1"
GLM = str(paths.GOLDEN / "glm4")
MODEL = ["--model", GLM]
COMMANDS = {
    "runtime.chat": [*MODEL, "--prompt", "hi"],
    "runtime.serve": MODEL,
    "runtime.ui": MODEL,
    "runtime.predict": [*MODEL, "--examples"],
    "runtime.bench": MODEL,
    "runtime.compare": [*MODEL, "--out", "report"],
    "runtime": ["--mode", "run", "--model_path", GLM],
    "convert": ["--model", str(paths.GOLDEN / "visualglm")],
    "quant": ["-src", GLM, "-dst", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_torch_that_cannot_be_imported(command, tmp_path):
    (tmp_path / "torch.py").write_text(f"raise ImportError({MESSAGE!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", command, *COMMANDS[command]],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{paths.ROOT}"},
    )
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert MESSAGE in error and error.endswith(f"run: {LINE}, then the same command again")


@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError])
def test_any_error_that_says_so(kind, capsys):
    def main(argv):
        raise kind(f"Failed to load the backend extension\n{MESSAGE}")

    assert run_command(main, []) == 3
    assert LINE in capsys.readouterr().err


@pytest.mark.parametrize(
    "place", ["usr/lib64/libgomp.so.1", "usr/lib/aarch64-linux-gnu/libgomp.so.1"]
)
def test_the_library_of_the_system(place, tmp_path, monkeypatch):
    """Where the message names none."""
    monkeypatch.setattr(broken_imports.platform, "machine", lambda: "aarch64")
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).touch()
    assert broken_imports.installed_libgomp(tmp_path) == f"/{place}"
    assert broken_imports.preload_line("libascendcl.so: cannot open shared object file") is None
