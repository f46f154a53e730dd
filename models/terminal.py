"""Output on any terminal."""

import sys


def replace_unprintable():
    """From now on characters that stdout's encoding does not have (Latin-1, GBK, ASCII) are
    replaced when they are printed, and bytes that stdin's cannot decode when they are read; stderr
    prints their escapes anyway."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not where a caller put another object
            stream.reconfigure(errors="replace")
