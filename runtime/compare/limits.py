"""What decides a comparison.

Takes --threshold and --limit, returns {stage: {measure: limit}}; the stages are vision, layers and
decode. What is missing there is decided by the dtype, when it is known (verdict.py, layerwise.py).
"""

from runtime.common.errors import ToolkitError
from runtime.common.flags import limit_value
from runtime.common.shared_flags import MAX_KL, MIN_TOP1

EXACT = 0.9999  # smallest cosine that passes, as the VisualGLM guide has it
QUANTISED = {"kl_mean": MAX_KL, "top1_agreement": MIN_TOP1}  # of its logits: the gate's rule
QUANTISED_LAYERS = {"relative": 0.5, "gain": 0.2}
# measures of which more is better; of all others less is
AT_LEAST = {"cosine_min", "cosine_mean", "top1_agreement", "top5_agreement"}
ERRORS = ("max_abs", "mean_abs", "rmse", "max_relative", "mean_relative", "relative_euclidean")
KNOWN = {
    "vision": ("cosine_min", "cosine_mean", *ERRORS),
    "decode": (*sorted(AT_LEAST), *ERRORS, "kl_max", "kl_mean", "candidate_perplexity"),
    "layers": ("relative", "gain"),
}


def read_limit(text: str) -> tuple[str, str, float]:
    """ "decode.kl_max=0.005" -> ("decode", "kl_max", 0.005)."""
    name = text.partition("=")[0]
    stage, _, measure = name.partition(".")
    measure = measure.replace("-", "_")
    if measure not in KNOWN.get(stage, ()):
        known = "; ".join(f"{stage}: {', '.join(measures)}" for stage, measures in KNOWN.items())
        raise ToolkitError(f"--limit {text} names no measure of a stage; there are {known}")
    return stage, measure, limit_value(text)


def all_limits(
    threshold: float | None, given: list[tuple[str, str, float]], rounded: bool
) -> dict[str, dict[str, float]]:
    """Stage -> measure -> limit; the limits `given` one by one win.

    rounded: the candidate's weights are rounded to 8 or 4 bits and the reference's are not. That
    moves logits by more than any kernel does; what it may cost is the rule of the quality gate of
    `python -m quant`, unless a cosine (`threshold`) is given.
    """
    limits = {"vision": {"cosine_min": threshold or EXACT}, "decode": {}, "layers": {}}
    if rounded:
        limits["layers"] |= QUANTISED_LAYERS
    if rounded and not threshold:
        limits["decode"] |= QUANTISED
    if threshold:
        limits["decode"]["cosine_min"] = threshold
    for stage, measure, value in given:
        limits[stage][measure] = value
    return limits


def is_within(measure: str, value: float, limit: float) -> bool:
    """NaN is never within a limit."""
    if measure in AT_LEAST:
        return value >= limit
    return value <= limit
