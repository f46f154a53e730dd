"""Exit codes and sentences of a command, whatever ends it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import paths
import pytest

from models.errors import ModelError
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError, run_command


def command(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ToolkitError("too long"), 2, "too long"),
        (ToolkitError("differs", CHECK_FAILED), 1, "differs"),
        (ToolkitError("no CANN", MISSING_COMPONENT), 3, "no CANN"),
        (ModelError("no shard"), 2, "no shard"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied: /x"),
        (OSError(28, "No space left on device"), 2, "No space left on device: standard output, or"),
        (OSError(28, "No space left on device", "/x"), 2, "/x; make room there, and run the same"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_one_line_and_a_code(error, code, sentence, capsys):
    assert run_command(command(error), []) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and sentence in shown and shown.count("\n") == 1


def test_debug_and_bugs_keep_their_traceback():
    with pytest.raises(ToolkitError):
        run_command(command(ToolkitError("x")), ["--debug"])
    with pytest.raises(ZeroDivisionError):
        run_command(command(ZeroDivisionError()), [])


def test_success_is_zero():
    assert run_command(lambda argv: None, []) == 0 and run_command(lambda argv: 1, []) == 1


def test_nobody_reads_our_output():
    code = "import sys; from runtime.common.errors import run_command as run; sys.exit(run(lambda argv: print('x' * 10 ** 6)))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=paths.ROOT
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def printed(text: str, encoding: str, stdout=subprocess.PIPE):
    """A command that prints the text in a terminal of that encoding."""
    code = f"import sys; from runtime.common.errors import run_command as run; sys.exit(run(lambda argv: print({text!r})))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=paths.ROOT,
        env=environment,
    )


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("latin-1", "é 答案 ✓", b"\xe9 ?? ?\n"),
        ("ascii", "é 答案", b"? ??\n"),
        ("gbk", "答案 é 한", "答案 é ?\n".encode("gbk")),
        ("utf-8", "caf\udce9", b"caf?\n"),
    ],
)
def test_what_a_terminal_cannot_show_is_replaced(encoding, text, shown):
    done = printed(text, encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_behind_stdout(buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    with open("/dev/full", "wb") as full:
        done = printed("answer", "utf-8", full)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: No space left on device: standard output")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "module",
    [
        "convert",
        "convert.nodes",
        "quant",
        "models.synthetic",
        "runtime.chat",
        "runtime.serve",
        "runtime.ui",
        "runtime.predict",
        "runtime.bench",
        "runtime.compare",
        "runtime.plan",
        "runtime.doctor",
        "runtime",
    ],
)
def test_every_command_prints_this_way(module):
    """Their main functions are run by run_command, or call what it calls."""
    spec = importlib.util.find_spec(module)
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert "run_command(main)" in source or "replace_unprintable()" in source
