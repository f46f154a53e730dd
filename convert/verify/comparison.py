"""How close ONNX Runtime is to torch. Takes two arrays of features, returns their Comparison."""

from dataclasses import dataclass

import numpy as np

from runtime.common.errors import CHECK_FAILED, ToolkitError

LOWEST_COSINE = 0.999999
LARGEST_ERROR = 1e-4  # relative to the largest value of the reference (measured: 1e-6)


@dataclass
class Comparison:
    """ONNX Runtime against torch on one image; errors are absolute, over all `elements`."""

    cosine: float
    max_abs: float
    mean_abs: float
    reference_max: float
    elements: int

    @property
    def passed(self) -> bool:
        """False for NaN, Inf and for nothing compared."""
        if not self.elements:
            return False
        largest = LARGEST_ERROR * self.reference_max
        return self.cosine >= LOWEST_COSINE and self.max_abs <= largest

    @property
    def verdict(self) -> str:
        return f"{self}: {'pass' if self.passed else 'FAIL'}"

    def __str__(self):
        return (
            f"cosine {self.cosine:.9f}, max abs {self.max_abs:.3g}, mean abs {self.mean_abs:.3g} "
            f"(largest value {self.reference_max:.3g}, {self.elements} elements)"
        )


def compare(reference: np.ndarray, candidate: np.ndarray) -> Comparison:
    """Comparison of two arrays of one shape, in float64. ToolkitError when the shapes differ."""
    if reference.shape != candidate.shape:
        raise ToolkitError(
            f"output shapes differ: torch {list(reference.shape)}, ONNX {list(candidate.shape)}",
            CHECK_FAILED,
        )
    a = reference.astype(np.float64).ravel()
    b = candidate.astype(np.float64).ravel()
    if not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Comparison(0.0, float("inf"), float("inf"), 0.0, 0)
    difference = np.abs(a - b)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = a @ b / norms if norms else np.array_equal(a, b)
    return Comparison(
        float(cosine),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        reference_max=float(np.abs(a).max()),
        elements=a.size,
    )
