"""Lines of jsonl files that others wrote, and of those that we write.

Takes a file, returns a Line for each of its lines that is not blank; takes a value, returns its
line as bytes.
"""

import codecs
import json
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ToolkitError

MAX_DEPTH = 100  # of lists and objects in each other; what handles a value may go down them
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold one half of a pair, UTF-8 may not
MARK = "\ufeff"  # of the byte order; joined files have it in the middle, too
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_UTF8 = "is not UTF-8 text"


@dataclass(frozen=True)
class Line:
    """number: of the line in its file, from 1. problem: why it has no value, or None."""

    number: int
    value: object = None
    problem: str | None = None


def read_lines(path: str, name: str) -> list[Line]:
    """The lines of the file that the flag `name` gave. ToolkitError for one that is no UTF-8 text
    at all; OSError if it cannot be read."""
    data = Path(path).read_bytes()
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            found.append(_parsed(number, line))
    found = [line for line in found if line]
    unreadable = [line for line in found if line.problem and NOT_UTF8 in line.problem]
    if data.startswith(WIDE_MARKS) or (found and len(unreadable) == len(found)):
        raise ToolkitError(
            f"{name} {path} {NOT_UTF8}; save it as UTF-8 jsonl, e.g. with iconv -f GBK -t UTF-8"
        )
    return found


def as_line(value) -> bytes:
    """JSON in UTF-8, with its line break; half a surrogate pair is written as its escape."""
    text = json.dumps(value, ensure_ascii=False)
    text = SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
    return text.encode() + b"\n"


def _parsed(number: int, line: bytes) -> Line | None:
    """None for a line of blanks only."""
    try:
        text = line.decode().strip().strip(MARK).strip()
    except UnicodeDecodeError as error:
        return Line(number, problem=f"the line {NOT_UTF8} (byte {error.start} of the line)")
    if not text:
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        return Line(number, problem=f"the line is nested deeper than {MAX_DEPTH} levels")
    except ValueError as error:
        return Line(number, problem=f"no JSON ({error})")
    if _is_deep(value):
        return Line(number, problem=f"the line is nested deeper than {MAX_DEPTH} levels")
    return Line(number, value)


def _is_deep(value) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _items(outer)]
        if not level:
            return False
    return True


def _items(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
