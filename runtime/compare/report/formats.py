"""Numbers as a comparison shows them.

Takes measures (None or NaN where there is no number), returns text.
"""

import math
from collections.abc import Callable


def cosine(value: float | None) -> str:
    """Eight decimals, cut and not rounded: what is below a limit never looks like the limit."""
    if _is_missing(value):
        return "NaN"
    return f"{math.floor(value * 1e8) / 1e8:.8f}"


def number(value: float | None) -> str:
    """Three digits."""
    if _is_missing(value):
        return "NaN"
    if value == 0:
        return "0"
    return f"{value:.2e}"


def decimals(form: str) -> Callable[[float | None], str]:
    """A function that formats by `form`, e.g. ".4f"."""

    def show(value: float | None) -> str:
        return "NaN" if value is None else format(value, form)

    return show


def percent(value: float) -> str:
    """Cut, not rounded: 100 % means all."""
    return f"{math.floor(value * 1000) / 10:g} %"


def cosine_limit(found: dict) -> float | None:
    """The smallest cosine of the logits that passes, in the findings of a comparison."""
    for check in found["checks"]:
        if check["stage"] == "decode" and check["measure"] == "cosine_min":
            return check["limit"]
    return None


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
