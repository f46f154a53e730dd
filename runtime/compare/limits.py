"""What decides a comparison: which measures every stage has, and the limits they are held to.

Limits are {stage: {measure: number}}; stages are vision, layers and decode. What is missing is decided by the dtype, when
it is known (verdict.py, layers.py).
"""

from runtime.common.errors import ToolkitError
from runtime.common.flags import limit_value

EXACT = 0.9999  # smallest cosine that passes, as the VisualGLM guide has it
QUANTISED = 0.99  # of the logits of a quantised model
QUANTISED_LAYERS = {"relative": 0.5, "gain": 0.2}
AT_LEAST = {
    "cosine_min",
    "cosine_mean",
    "top1_agreement",
    "top5_agreement",
}  # of all others less is better
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


def all_limits(options, packed: bool = False) -> dict[str, dict[str, float]]:
    """Stage -> measure -> limit. Rounding to 8 bits moves logits by more than any kernel does; what it may cost is judged by
    `python -m quant`, here a broken scale shows. packed: the candidate rounds its weights itself (--cpu-weights)."""
    rounded = (
        packed
        or is_quantised(options.model)
        and (options.native or not is_quantised(options.reference))
    )
    limits = {
        "vision": {"cosine_min": options.threshold or EXACT},
        "decode": {"cosine_min": QUANTISED} if rounded else {},
        "layers": dict(QUANTISED_LAYERS) if rounded else {},
    }
    if options.threshold:
        limits["decode"]["cosine_min"] = options.threshold
    for stage, measure, value in options.limit:
        limits[stage][measure] = value
    return limits


def is_quantised(model: str) -> bool:
    """msmodelslim describes what it did beside the weights."""
    from models.checkpoint.quantized import find_description

    return find_description(model) is not None
