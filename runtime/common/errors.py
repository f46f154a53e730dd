"""User-facing errors and exit codes.

Takes a command's main function, returns its exit code: 1 a check failed, 2 a user mistake, 3 a
component is missing, 130 Ctrl-C, 141 nobody reads our output any more.
"""

import os
import sys

from models.errors import UserError

from .notes import notes_on_stderr

CHECK_FAILED = 1
USER_MISTAKE = 2
MISSING_COMPONENT = 3
INTERRUPTED = 130
READER_GONE = 141


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
    try:
        with notes_on_stderr():
            return main(arguments) or 0
    except KeyboardInterrupt:
        return _fail(
            "interrupted; nothing half-written was kept, run the same command again to continue",
            INTERRUPTED,
        )
    except BrokenPipeError:
        # head or less has closed our stdout: Python must not flush into it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except Exception as error:
        expected = isinstance(error, (UserError, OSError, MemoryError))
        if "--debug" in arguments or not expected:
            raise
        return _fail(_sentence(error), getattr(error, "exit_code", USER_MISTAKE))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'unnamed file'}"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --max-model-len or another --dtype, or free memory and run again"
    return str(error)


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code
