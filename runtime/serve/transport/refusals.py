"""What is wrong with a body, in this service's words.

Takes what pydantic reports about a body, returns the ApiError about one field of it.
"""

import json

from runtime.serve.errors import ApiError

MOST_CHARACTERS = 500  # of a message
# pydantic's kinds of errors -> what the field takes
WANTED = {
    **dict.fromkeys(("string_type", "string_unicode"), "a text"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
}
# pydantic's kinds of errors -> what is said of the field; the words in braces are pydantic's
SAID = {
    "missing": "is missing",
    "greater_than_equal": "is {value}; {ge} or more is needed",
    "greater_than": "is {value}; more than {gt} is needed",
    "less_than_equal": "is {value}; {le} or less is needed",
    "less_than": "is {value}; less than {lt} is needed",
    "finite_number": "is {value}; a finite number is needed",
    "int_from_float": "is {value}; a whole number is needed",
    "too_long": "has {actual_length:,} entries; the limit is {max_length:,}",
    "too_short": "has {actual_length} entries; {min_length} or more are needed",
    "string_too_long": "has more than {max_length:,} characters, which is the limit",
    "string_unicode": "has half of a surrogate pair, which is no character; cut texts between "
    "whole characters",
    "string_pattern_mismatch": "does not fit the pattern {pattern}",
    "literal_error": "is {value}; give {expected}",
    "value_error": "{error}",
}


class WrongPart(ValueError):
    """A validator's complaint about a part of its field. at: keys and places of the part in the
    field."""

    def __init__(self, message: str, *at: str | int):
        super().__init__(message)
        self.at = at


def kind_of(value) -> str:
    """The JSON type of a value, as messages name it."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def refused_field(problems: list[dict], body) -> ApiError:
    """The error about one field, the one that lies deepest. problems: as pydantic reports them for
    `body`; of a union it reports every branch."""
    paths = [path_in(body, each) for each in problems]
    path = max(paths, key=len)
    problem = problems[paths.index(path)]
    field = place_of(path)
    said = sentence(problem, value_at(body, path))
    return ApiError(f"{field or 'the body'} {said}"[:MOST_CHARACTERS], param=field or None)


def place_of(path) -> str:
    """Keys and places -> "messages[2].content[1].image_url.url"."""
    place = ""
    for step in path:
        place += f"[{step}]" if isinstance(step, int) else f".{step}"
    return place.removeprefix(".")


def sentence(problem: dict, value) -> str:
    """What pydantic's `problem` says of a field with that value."""
    kind = problem["type"]
    words = {**problem.get("ctx", {}), "value": shown(value)}
    if kind in SAID and not (kind == "string_unicode" and not isinstance(value, str)):
        return SAID[kind].format(**words)
    if kind in WANTED:
        return f"is {kind_of(value)}; give {WANTED[kind]}"
    return f"is refused: {problem['msg']}"


def shown(value) -> str:
    """A number or truth value itself; of anything else, which may be private, its kind."""
    if isinstance(value, int | float):
        return json.dumps(value)[:40]
    return kind_of(value)


def path_in(body, problem: dict) -> list:
    """The keys and places of a problem that stand in the body, pydantic's names for the branches of
    a union left out; the last may be a field that is missing there."""
    path = []
    value = body
    missing = problem["type"] == "missing"
    location = problem["loc"]
    for step in location:
        if has(value, step):
            value = value[step]
            path.append(step)
        elif missing and step is location[-1]:
            path.append(step)
    return [*path, *getattr(problem.get("ctx", {}).get("error"), "at", ())]


def value_at(body, path):
    """None for a path whose end is not there."""
    for step in path:
        if not has(body, step):
            return None
        body = body[step]
    return body


def has(value, step) -> bool:
    """Whether `step` is a key or a place of a JSON value."""
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value
