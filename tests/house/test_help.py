"""`--help` of the commands: complete, pinned in tests/help/, and answered without the heavy packages.

After a deliberate change: `REFRESH_HELP=1 python -m pytest tests/house/test_help.py`, then read the diff.
"""

import os
import subprocess
import sys

import paths
import pytest

ROOT = paths.ROOT
PINNED = paths.TESTS / "help"
COMMANDS = (
    "convert",
    "convert.nodes",
    "quant",
    "runtime",
    "runtime.bench",
    "runtime.chat",
    "runtime.compare",
    "runtime.doctor",
    "runtime.plan",
    "runtime.predict",
    "runtime.serve",
    "runtime.ui",
)
HEAVY = {
    "msmodelslim",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "transformers",
    "matplotlib",
    "jinja2",
    "rich",
    "PIL",
    "fastapi",
    "uvicorn",
    "pydantic",
    "gradio",
    "openai",
    "ray",
}
SCRIPT = """
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *sorted({heavy} & sys.modules.keys()), file=sys.stderr))
sys.argv = ["command", "--help"]
runpy.run_module("{module}", run_name="__main__")
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_help(module):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module=module, heavy=HEAVY)],
        cwd=ROOT,
        encoding="utf-8",
        capture_output=True,
        env={**os.environ, "COLUMNS": "60", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "imported:", f"{module} --help imports what makes it slow"
    pinned = PINNED / f"{module}.txt"
    if os.environ.get("REFRESH_HELP"):
        pinned.parent.mkdir(exist_ok=True)
        pinned.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == pinned.read_text(encoding="utf-8"), (
        "help changed; if that is meant: REFRESH_HELP=1 python -m pytest tests/house/test_help.py"
    )
