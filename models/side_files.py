"""Reading the side files of a checkpoint: config.json, generation_config.json, index files, templates and the like.

Takes paths, returns texts and JSON objects. Nothing in these files is believed: kind, size, encoding and nesting of a
file are bounded, a field that is null counts as absent, and every known field has the type and range of `side_fields`.
Whatever is wrong ends in a ModelError that names the file and the field.
"""

import json
import re
from pathlib import Path

from .errors import ModelError
from .files import open_regular
from .side_fields import ANY_FIELD, Rule, rules_of, shown

LARGEST = 16 << 20  # bytes; an index of 150,000 tensors
DEEPEST = 64  # objects and lists in one another
AGAIN = "download it again"
LFS_MARK = b"version https://git-lfs"
WEB_PAGES = (b"<!doctype html", b"<html")
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one


class Settings(dict):
    """A JSON object without its null fields; a field that is asked for and missing is a ModelError.

    file: where it stands. place: the way to it in the file, "" or "vision_config.".
    """

    def __init__(self, fields: dict, file: Path | str, place: str = ""):
        super().__init__(fields)
        self.file = file
        self.place = place

    def __missing__(self, field: str):
        raise ModelError(
            f"{self.file} has no {self.place}{field}; take {Path(self.file).name} from the release"
        )

    def __or__(self, other: dict) -> "Settings":
        return Settings({**self, **other}, self.file, self.place)

    def __ror__(self, other: dict) -> "Settings":
        return Settings({**other, **self}, self.file, self.place)


def read_json(path: str | Path) -> Settings:
    """The file's object, checked field by field; ModelError if it is missing, too large or wrong."""
    fields = read_as_stored(path)
    return _checked(fields, Path(path), "", rules_of(Path(path).name))


def read_optional_json(path: str | Path) -> Settings:
    """As read_json; empty without the file."""
    return read_json(path) if is_there(path) else Settings({}, path)


def read_as_stored(path: str | Path) -> dict:
    """The file's object with its null fields, nothing in it checked: to be copied."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} holds {shown(content)} where a JSON object {{...}} is expected; {AGAIN}"
        )
    return content


def parse_json(text: str, path: str | Path):
    """The value that a JSON text holds; ModelError for what is not valid, or has two values of one name."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ModelError(
            f"{path} has a text with half a surrogate pair, which is no text; {AGAIN}"
        ) from None
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply; {AGAIN}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); {AGAIN}") from None


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with the mark that says so."""
    content = read_bytes(path, largest)
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path} is not a text in UTF-8 (byte {error.start:,}); save it as UTF-8, or {AGAIN}"
        ) from None


def read_bytes(path: str | Path, largest: int = LARGEST) -> bytes:
    """A whole file of at most `largest` bytes; ModelError if it is missing, larger, or no regular file."""
    try:
        with open_regular(path) as stream:
            content = stream.read(largest + 1)
    except FileNotFoundError:
        raise ModelError(
            f"{path} is missing; give --model the folder of a downloaded checkpoint"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None
    if len(content) > largest:
        raise ModelError(f"{path} has more than {largest >> 20} MB, which none has; {AGAIN}")
    if problem := stand_in(content):
        raise ModelError(f"{path} {problem}")
    return content


def stand_in(content: bytes) -> str | None:
    """What a download left in place of a file, as the end of a sentence about it; None for others."""
    if content.startswith(LFS_MARK):
        return "is only a Git LFS pointer, not the file itself; run `git lfs pull`"
    if content.lstrip()[: len(WEB_PAGES[0])].lower().startswith(WEB_PAGES):
        return f"is a web page, which was stored in place of the file; {AGAIN}"
    return None


def is_there(path: str | Path) -> bool:
    """Whether there is anything of the name; what is no regular file is refused when it is read."""
    return Path(path).exists()


def _object(pairs: list[tuple]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if fields[name] != value:
                raise ValueError(f"two values of {shown(name)}")
    return fields


def _checked(fields: dict, file: Path, place: str, rules: dict[str, Rule], depth=0) -> Settings:
    """The object without null fields, and so every object in it."""
    if depth > DEEPEST:
        raise ModelError(f"{file} is nested too deeply; {AGAIN}")
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        _check(name, value, file, place, rules)
        kept[name] = value
        if isinstance(value, dict):
            kept[name] = _checked(value, file, f"{place}{name}.", rules, depth + 1)
    return Settings(kept, file, place)


def _check(name: str, value, file: Path, place: str, rules: dict[str, Rule]):
    """ModelError if the field is known and its value is not what it may be."""
    rule = rules.get(place + name) or rules.get(name) or rules.get(ANY_FIELD)
    if rule and not rule.fits(value):
        raise ModelError(
            f"{file} says {place}{name} {shown(value)}, which must be {rule.words}; "
            f"take {file.name} from the release"
        )
