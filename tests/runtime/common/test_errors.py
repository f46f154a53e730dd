"""Exit codes and sentences of a command, whatever ends it."""

import os
import subprocess
import sys

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
        (OSError(28, "No space left on device"), 2, "No space left on device"),
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
