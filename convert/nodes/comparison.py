"""One node's comparison. Takes the values of reference and candidate, returns measures."""

from dataclasses import dataclass

import numpy as np

from runtime.common.metrics import TINY, compare_rows, kl, summarize


@dataclass
class NodeComparison:
    """`candidate`: node of the graph, module of the other tower, or dumped operator. `golden`:
    torch module or ONNX node. "*" stands for a side that has no such node. `reason`: why it could
    not be compared; then `measures` is None.
    """

    index: int
    candidate: str
    operator: str
    output: str
    golden: str
    shape: tuple = ()
    dtype: str = "float32"
    reason: str = ""
    measures: dict | None = None


def measure(reference: np.ndarray, candidate: np.ndarray) -> dict:
    """Metrics of two arrays of one shape, each taken as a single row, and what only msit has.

    gain: |projection of the candidate onto the reference - 1|; accumulated: sum of |errors| / sum
    of |reference|; moments: (mean, standard deviation) of candidate and reference.
    """
    a = reference.reshape(1, -1).astype(np.float64)
    b = candidate.reshape(1, -1).astype(np.float64)
    finite = np.isfinite(a).all() and np.isfinite(b).all()
    with np.errstate(invalid="ignore"):
        return {
            **summarize([compare_rows(a, b)]),
            "shape": list(reference.shape),
            "gain": abs(_projection(a, b) - 1),
            "accumulated": float(np.abs(a - b).sum() / max(np.abs(a).sum(), TINY)),
            "kl": float(kl(a, b)[0]) if finite else float("nan"),
            "moments": [(float(x.mean()), float(x.std())) for x in (b, a)],
        }


def _projection(reference: np.ndarray, candidate: np.ndarray) -> float:
    """What the candidate gives where the reference gives 1; 1 for a reference of zeros."""
    if not reference.any():
        return 1.0
    square = max(np.sum(reference * reference), TINY)
    return float(np.sum(reference * candidate) / square)
