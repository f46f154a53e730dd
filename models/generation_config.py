"""generation_config.json. Takes a model folder, returns the checked fields that say how answers are
sampled and where they end.

Fields that are null count as absent, as in transformers. Anything that transformers could not use
either is a ModelError that names the file and the field.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError
from .side_fields import shown
from .side_files import is_there, read_json

FILE = "generation_config.json"
MAX_REPETITION_PENALTY = 100  # as --repetition-penalty
MIN_REPETITION_PENALTY = 0.01
LARGEST = 1e300


@dataclass(frozen=True)
class Rule:
    """kind: type of the value. fits(value) -> whether it is in range; `range` says so in words."""

    kind: type
    fits: Callable
    range: str


RULES = {
    "do_sample": Rule(bool, lambda value: True, "true or false"),
    "temperature": Rule(float, lambda t: t >= 0, "a number from 0 up"),
    "top_p": Rule(float, lambda p: 0 < p <= 1, "a number above 0 and up to 1"),
    "top_k": Rule(int, lambda k: 0 <= k < 1 << 31, "a whole number from 0 up"),
    "repetition_penalty": Rule(
        float,
        lambda r: MIN_REPETITION_PENALTY <= r <= MAX_REPETITION_PENALTY,
        f"a number from {MIN_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY}",
    ),
    "max_length": Rule(int, lambda n: 1 <= n < 1 << 31, "a whole number from 1 up"),
    "max_new_tokens": Rule(int, lambda n: 1 <= n < 1 << 31, "a whole number from 1 up"),
}


def read_generation_config(directory: Path) -> dict:
    """The known fields that the folder's file gives: those of `RULES`, and eos_token_id as a tuple of
    ids. {} without the file.

    do_sample is always there when the file is: without it transformers does not sample.
    """
    path = Path(directory) / FILE
    if not is_there(path):
        return {}
    given = read_json(path)
    known = {"do_sample": False}
    for field, rule in RULES.items():
        if given.get(field) is not None:
            known[field] = _checked(path, field, given[field], rule)
    if given.get("eos_token_id") is not None:
        known["eos_token_id"] = token_ids(path, "eos_token_id", given["eos_token_id"])
    return known


def _checked(path: Path, field: str, value, rule: Rule):
    converted = _converted(value, rule.kind)
    if converted is None or not rule.fits(converted):
        raise ModelError(
            f"{path} has {field} {shown(value)}; {rule.range} is needed: correct the file"
        )
    return converted


def _converted(value, kind: type):
    """The value as `kind`; None for one of another type. A whole float such as 50.0 is an int."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if not isinstance(value, int | float) or not abs(value) < LARGEST:  # nor is NaN
        return None
    if kind is int and value != int(value):
        return None
    return kind(value)


def token_ids(path: Path, field: str, value) -> tuple[int, ...]:
    """The ids in a field that holds one id or a list of them; () for null."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 1 << 31:
            raise ModelError(
                f"{path} has {field} {shown(value)}; a token id or a list of them is needed: "
                "correct the file"
            )
    return tuple(ids)
