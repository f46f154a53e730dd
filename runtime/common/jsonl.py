"""Lines of jsonl files that others wrote, and of those that we write.

Takes a file, returns a Line for each of its lines that is not blank; takes a value, returns its
line as bytes.
"""

import codecs
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ToolkitError

MAX_DIGITS = 1000  # of a whole number
MAX_DEPTH = 100  # of lists and objects in each other; what handles a value may go down them
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may hold one half of a pair, UTF-8 may not
MARK = "\ufeff"  # of the byte order; joined files have it in the middle, too
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_UTF8 = "is not UTF-8 text"
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PAR1": "parquet",
}
ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d{1,18}(?=[\s,}]))')


@dataclass(frozen=True)
class Line:
    """number: of the line in its file, from 1. problem: why it has no value, or None; value: then
    its id alone, {"id": ...}, where one can be read."""

    number: int
    value: object = None
    problem: str | None = None


def read_lines(path: str, name: str) -> list[Line]:
    """The lines of the file that the flag `name` gave. ToolkitError for one that is no UTF-8 text
    at all; OSError if it cannot be read."""
    data = Path(path).read_bytes()
    for mark, kind in PACKED.items():
        if data.startswith(mark):
            raise ToolkitError(
                f"{name} {path} is a {kind} file; unpack it, and give the jsonl file"
            )
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            found.append(_parsed(number, line))
    found = [line for line in found if line]
    unreadable = [line for line in found if line.problem and NOT_UTF8 in line.problem]
    if data.startswith(WIDE_MARKS) or (found and len(unreadable) == len(found)):
        form = "UTF-16" if data.startswith(WIDE_MARKS) else "GBK"
        raise ToolkitError(
            f"{name} {path} {NOT_UTF8}; save it as UTF-8 jsonl, e.g. with iconv -f {form} -t UTF-8"
        )
    if found and all(map(_is_no_object, found)) and _is_one_value(data):
        raise ToolkitError(
            f"{name} {path} is one JSON list or object over the whole file; write one object per "
            f"line, e.g. with jq -c '.[]'"
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
        return _bad(number, line, f"the line {NOT_UTF8} (byte {error.start} of the line)")
    if not text:
        return None
    try:
        value = _load(text)
    except RecursionError:
        return _bad(number, line, f"the line is nested deeper than {MAX_DEPTH} levels")
    except json.JSONDecodeError as error:
        return _bad(number, line, _no_json(error))
    except ValueError as error:
        return _bad(number, line, f"no JSON ({error})")
    if _is_deep(value):
        return _bad(number, line, f"the line is nested deeper than {MAX_DEPTH} levels")
    return Line(number, value)


def _bad(number: int, line: bytes, problem: str) -> Line:
    found = ID.search(line)
    try:
        fields = {"id": json.loads(found[1])} if found else None
    except ValueError:
        fields = None
    return Line(number, fields, problem)


def _load(text: str):
    """JSON in the strict sense: what is written again must be JSON for others, too."""
    return json.loads(text, parse_constant=_no_number, parse_float=_real, parse_int=_whole)


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON; write null")


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits; the limit is {MAX_DIGITS:,}")
    return int(digits)


def _no_json(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data" and error.doc[error.pos] in "{[":
        return f"two JSON values in one line: a line break is missing in front of character {error.colno}"
    return f"no JSON ({error.msg} at character {error.colno})"


def _is_no_object(line: Line) -> bool:
    return bool(line.problem) or not isinstance(line.value, dict)


def _is_one_value(data: bytes) -> bool:
    """Whether the whole file is one list or object of JSON."""
    try:
        return isinstance(json.loads(data), list | dict)
    except (ValueError, RecursionError):
        return False


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
