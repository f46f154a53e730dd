"""Notes: one line each about what the library is doing, e.g. the memory plan, or a conversion that
begins.

A note goes to the logger "ascend_vlm" at level INFO. A script that imports the library prints
nothing unless it configures that logger; commands print the bare lines on stderr.
"""

import logging
import sys
from contextlib import contextmanager

from models.terminal import printable

_logger = logging.getLogger("ascend_vlm")
_logger.addHandler(logging.NullHandler())


def note(text: str):
    _logger.info("%s", text)


class _Printer(logging.Handler):
    def emit(self, record):
        print(printable(record.getMessage()), file=sys.stderr)


@contextmanager
def notes_on_stderr():
    """Print notes while the block runs, and hand them to no other handler."""
    printer = _Printer()
    level = _logger.level
    _logger.addHandler(printer)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    try:
        yield
    finally:
        _logger.removeHandler(printer)
        _logger.setLevel(level)
        _logger.propagate = True
