"""One compared place inside an encoder: how far its value is from the reference's, and its row in msit's table."""

import csv
import io
from dataclasses import dataclass

from runtime.common.errors import ToolkitError
from runtime.common.flags import limit_value

# the largest that pass; "cosine_min": the smallest. gain: |what the candidate gives where the reference gives 1, less 1|
FP32 = {
    "relative_euclidean": 3e-5,
    "gain": 5e-7,
}  # clean towers of all families: up to 2e-6 and 3e-8
MSIT = {
    "cosine_min": 0.99,
    "relative_euclidean": 0.05,
    "kl": 0.005,
    "rmse": 1.0,
    "mean_relative": 1.0,
}


@dataclass
class Node:
    """candidate: node of the graph, module of the other tower, or dumped operator. golden: torch module or ONNX node.
    reason: why it could not be compared; then it has no measures. "*" stands for a side that has no such place."""

    index: int
    candidate: str
    operator: str
    output: str
    golden: str
    shape: tuple = ()
    dtype: str = "float32"
    reason: str = ""
    measures: dict | None = None


def read_limits(texts: list[str], defaults: dict[str, float]) -> dict[str, float]:
    """`defaults` and what is given as "relative_euclidean=0.01"."""
    limits = dict(defaults)
    for text in texts:
        name = text.partition("=")[0].replace("-", "_")
        if name not in FP32 | MSIT:
            raise ToolkitError(
                f"--limit {text} names no measure; there are {', '.join(FP32 | MSIT)}"
            )
        limits[name] = limit_value(text)
    return limits


def measure(reference, candidate) -> dict:
    """metrics of the two arrays as one row each, and what only msit's table wants."""
    import numpy as np

    from runtime.common.metrics import TINY, compare_rows, kl, summarize

    a, b = (x.reshape(1, -1).astype(np.float64) for x in (reference, candidate))
    finite = np.isfinite(a).all() and np.isfinite(b).all()
    with np.errstate(invalid="ignore"):
        gain = float(np.sum(a * b) / max(np.sum(a * a), TINY)) if a.any() else 1.0
        return {
            **summarize([compare_rows(a, b)]),
            "shape": list(reference.shape),
            "gain": abs(gain - 1),
            "accumulated": float(np.abs(a - b).sum() / max(np.abs(a).sum(), TINY)),
            "kl": float(kl(a, b)[0]) if finite else float("nan"),
            "moments": [(float(x.mean()), float(x.std())) for x in (b, a)],
        }


def passes(node: Node, limits: dict[str, float]) -> bool:
    """False for NaN; what could not be compared passes, and is told."""
    m = node.measures
    return m is None or all(
        m[name] >= limit if name == "cosine_min" else m[name] <= limit
        for name, limit in limits.items()
    )


def describe(node: Node, limits: dict[str, float], golden: str) -> str:
    """golden: what the reference side is called."""
    m = node.measures
    broken = [f"{name} {m[name]:.3g}" for name in limits if not passes(node, {name: limits[name]})]
    what = f"{m['nonfinite']:,} values are NaN or Inf" if m["nonfinite"] else ", ".join(broken)
    return (
        f"{node.candidate} ({node.operator}, {m['shape']}, {golden} {node.golden}) is the first that departs: {what}, "
        f"cosine {m['cosine_min']:.8f}"
    )


def table(nodes: list[Node], limits: dict[str, float]) -> str:
    """msit's columns; NPUDump is the candidate."""
    from runtime.common.msit import MSIT_COLUMNS

    stored = io.StringIO()
    rows = csv.DictWriter(stored, MSIT_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for node in nodes:
        rows.writerow(
            {
                "Index": node.index,
                "OpType": node.operator,
                "NPUDump": node.candidate,
                "DataType": node.dtype,
                "GroundTruth": node.golden,
                "TensorIndex": node.output,
                "CompareFailReason": node.reason,
                "IsNpuOps": "YES" if node.golden == "*" else "NO",
                "IsOutputNode": "YES" if node is nodes[-1] else "NO",
                "IsPrecisionError": "NO" if passes(node, limits) else "YES",
                **_measured(node.measures),
            }
        )
    return stored.getvalue()


def _measured(m: dict | None) -> dict:
    if m is None:
        return {}
    (mean, std), (golden_mean, golden_std) = m["moments"]
    return {
        "Shape": m["shape"],
        "Overflow": "YES" if m["nonfinite"] else "NO",
        "CosineSimilarity": m["cosine_min"],
        "MaxAbsoluteError": m["max_abs"],
        "AccumulatedRelativeError": m["accumulated"],
        "RelativeEuclideanDistance": m["relative_euclidean"],
        "KullbackLeiblerDivergence": m["kl"],
        "StandardDeviation": f"({mean:.6g};{std:.6g}),({golden_mean:.6g};{golden_std:.6g})",
        "MeanAbsoluteError": m["mean_abs"],
        "RootMeanSquareError": m["rmse"],
        "MaxRelativeError": m["max_relative"],
        "MeanRelativeError": m["mean_relative"],
    }
