"""Tools of the ATC tests: `convert` as a function, and the stand-in `atc` as an installed tool."""

import contextlib
import io
import sys
from pathlib import Path

import paths
import stand_in_atc

from convert.__main__ import main
from convert.atc.golden_features import compute
from runtime.common.errors import run_command

GOLDEN = paths.GOLDEN
MODEL = GOLDEN / "visualglm"


def convert(out, *more, model=MODEL) -> tuple[int, str]:
    """(exit code, everything printed) of `python -m convert`, run in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_command(main, ["--model", str(model), "--out", str(out), *more])
    return code, printed.getvalue()


def in_process(family, graph, aipp=None):
    """Takes the place of golden_features.features, which starts a child process."""
    return compute(str(family.directory), str(graph), aipp and str(aipp))


def install(root: Path, monkeypatch, version: str | None = "8.0.RC2") -> Path:
    """Installs the stand-in as <root>/bin/atc on PATH, with CANN's version file; version None: without it."""
    (root / "bin").mkdir(parents=True)
    tool = root / "bin" / "atc"
    tool.write_text(
        f'#!/bin/bash\n{sys.executable} {stand_in_atc.__file__} {version or "9.0"} "$@"\n'
    )
    tool.chmod(0o755)
    if version:
        (root / "x86_64-linux").mkdir()
        (root / "x86_64-linux" / "ascend_toolkit_install.info").write_text(
            f"package_name=Ascend-cann-toolkit\nversion={version}\narch=x86_64\nos=linux\n"
        )
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return tool
