"""Limits of a node's measures. Takes a comparison, returns whether it passes, and what does not."""

from runtime.common.errors import ToolkitError
from runtime.common.flags import limit_value

from .comparison import NodeComparison

# The largest values that pass; of "cosine_min" the smallest.
# Clean towers of all families have up to 2e-6 and 3e-8.
FP32 = {"relative_euclidean": 3e-5, "gain": 5e-7}
MSIT = {
    "cosine_min": 0.99,
    "relative_euclidean": 0.05,
    "kl": 0.005,
    "rmse": 1.0,
    "mean_relative": 1.0,
}


def read_limits(texts: list[str], defaults: dict[str, float]) -> dict[str, float]:
    """`defaults`, overridden by texts such as "relative_euclidean=0.01".

    ToolkitError for an unknown measure.
    """
    limits = dict(defaults)
    for text in texts:
        name = text.partition("=")[0].replace("-", "_")
        if name not in FP32 | MSIT:
            raise ToolkitError(
                f"--limit {text} names no measure; there are {', '.join(FP32 | MSIT)}"
            )
        limits[name] = limit_value(text)
    return limits


def broken_limits(node: NodeComparison, limits: dict[str, float]) -> list[str]:
    """Measures outside their limit, NaN among them; of a node without measures, none."""
    broken = []
    for name, limit in limits.items() if node.measures else ():
        value = node.measures[name]
        passed = value >= limit if name == "cosine_min" else value <= limit
        if not passed:
            broken.append(name)
    return broken


def passes(node: NodeComparison, limits: dict[str, float]) -> bool:
    return not broken_limits(node, limits)


def describe_failure(node: NodeComparison, limits: dict[str, float], golden_kind: str) -> str:
    """`golden_kind`: what the reference's side is, "ONNX node" or "torch module"."""
    measures = node.measures
    if measures["nonfinite"]:
        what = f"{measures['nonfinite']:,} values are NaN or Inf"
    else:
        what = ", ".join(f"{name} {measures[name]:.3g}" for name in broken_limits(node, limits))
    return (
        f"{node.candidate} ({node.operator}, {measures['shape']}, {golden_kind} {node.golden}) is the first that "
        f"deviates: {what}, cosine {measures['cosine_min']:.8f}"
    )
