"""Numbers as a comparison shows them."""

import math


def cosine(value: float | None) -> str:
    """Eight decimals, cut and not rounded: what is below a limit never looks like the limit."""
    return "NaN" if value is None or math.isnan(value) else f"{math.floor(value * 1e8) / 1e8:.8f}"


def number(value: float | None) -> str:
    return "NaN" if value is None or math.isnan(value) else "0" if value == 0 else f"{value:.2e}"


def decimals(form: str):
    return lambda value: "NaN" if value is None else format(value, form)


def percent(value: float) -> str:
    """Cut, not rounded: 100 % means all."""
    return f"{math.floor(value * 1000) / 10:g} %"


def cosine_limit(found: dict) -> float | None:
    """Of the logits."""
    return next(
        (
            c["limit"]
            for c in found["checks"]
            if (c["stage"], c["measure"]) == ("decode", "cosine_min")
        ),
        None,
    )
