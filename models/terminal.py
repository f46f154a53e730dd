"""Output on any terminal."""

import sys

TABS_AND_BREAKS = "\t\n"
CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))]  # category Cc of Unicode
SHOWN = {ord(each): f"\\x{ord(each):02x}" for each in CONTROLS if each not in TABS_AND_BREAKS}
SHOWN[ord("\r")] = None


def printable(text: str) -> str:
    """The text with its control characters as escapes: a stranger's names, or an answer, must not
    steer the terminal. Tabs and line breaks stay."""
    return text.translate(SHOWN)


def for_stdout(text: str) -> str:
    """The text as it is printed: `printable` on a terminal, unchanged where it is piped."""
    return printable(text) if sys.stdout.isatty() else text


def replace_unprintable():
    """From now on characters that stdout's encoding does not have (Latin-1, GBK, ASCII) are
    replaced when they are printed, and bytes that stdin's cannot decode when they are read; stderr
    prints their escapes anyway."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not where a caller put another object
            stream.reconfigure(errors="replace")
