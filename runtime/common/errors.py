"""User-facing errors and exit codes.

Takes a command's main function, returns its exit code: 1 a check failed, 2 a user mistake, 3 a
component is missing, 130 Ctrl-C, 141 nobody reads our output any more.
"""

import contextlib
import errno
import os
import sys

from models.errors import UserError
from models.terminal import printable, replace_unprintable

from . import broken_imports
from .notes import notes_on_stderr

CHECK_FAILED = 1
USER_MISTAKE = 2
MISSING_COMPONENT = 3
INTERRUPTED = 130
READER_GONE = 141
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ToolkitError(UserError):
    """One sentence for the user: what, the value, the limit, the next command."""

    def __init__(self, message: str, exit_code: int = USER_MISTAKE):
        super().__init__(message)
        self.exit_code = exit_code


def run_command(main, argv=None) -> int:
    """Run `main(argv) -> int | None` as a command: user errors become one line on stderr and an
    exit code.

    `--debug` anywhere in the arguments shows the traceback instead.
    """
    arguments = sys.argv[1:] if argv is None else argv
    replace_unprintable()
    try:
        with notes_on_stderr():
            code = main(arguments) or 0
            _flush_stdout()
            return code
    except KeyboardInterrupt:
        return _fail(
            "interrupted; nothing half-written was kept, run the same command again to continue",
            INTERRUPTED,
        )
    except BrokenPipeError:
        # head or less has closed our stdout: Python must not flush into it again at exit
        _give_stdout_up()
        return READER_GONE
    except Exception as error:
        if "--debug" not in arguments and (broken := broken_imports.sentence(error)):
            return _fail(broken, MISSING_COMPONENT)
        expected = isinstance(error, (UserError, OSError, MemoryError))
        if "--debug" in arguments or not expected:
            raise
        with contextlib.suppress(OSError):
            _flush_stdout()
        return _fail(_sentence(error), getattr(error, "exit_code", USER_MISTAKE))


def _flush_stdout():
    """OSError if what was printed cannot be written; Python does not try again at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        _give_stdout_up()
        raise


def _give_stdout_up():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = error.filename or "standard output, or a file that the system does not name"
        advice = ""
        if error.errno in DISK_FULL:
            advice = "; make room there, and run the same command again"
        return f"{error.strerror}: {place}{advice}"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --max-model-len or another --dtype, or free memory and run again"
    return str(error)


def _fail(message: str, exit_code: int) -> int:
    print(printable(f"error: {message}"), file=sys.stderr)
    return exit_code
