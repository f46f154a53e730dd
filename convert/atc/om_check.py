"""Whether an .om computes what the ONNX graph does.

Takes a session on a device, returns the record of an attempt.
"""

import time

import numpy as np

from models.family import Family
from runtime.common.errors import ToolkitError
from runtime.common.metrics import compare_rows
from runtime.vision.session import VisionSession

from .golden_features import verification_pixels

DISTANCE = 0.05  # largest |om - onnx| / |onnx| of all features, beside the family's cosine
RUNS = 5  # timed, after one that is not


def measure_om(family: Family, session: VisionSession, golden: np.ndarray, mode: str) -> dict:
    """Record of the .om against the features `golden`, float32 [images, rows, hidden].

    {mode, passed, cosine (lowest of all rows), distance (relative), latency_ms (per image)};
    of an .om that gives NaN or Inf {mode, passed, error}.
    """
    pixels = verification_pixels(family)
    try:
        features = session.encode(pixels)
        latency = float(np.median([_milliseconds(session, pixels[:1]) for _ in range(RUNS)]))
    except ToolkitError as error:  # NaN or Inf
        print(f"verify OM {mode}: {error}: FAIL")
        return {"mode": mode, "passed": False, "error": str(error)}
    cosine = _lowest_row_cosine(golden, features)
    distance = float(np.linalg.norm(features - golden) / np.linalg.norm(golden))
    passed = bool(golden.size and cosine >= family.encoder_cosine and distance <= DISTANCE)
    print(
        f"verify OM {mode}: lowest row cosine {cosine:.6f} (limit {family.encoder_cosine}), distance {distance:.2g} "
        f"(limit {DISTANCE}), {latency:.2f} ms: {'pass' if passed else 'FAIL'}"
    )
    return {
        "mode": mode,
        "passed": passed,
        "cosine": cosine,
        "distance": distance,
        "latency_ms": latency,
    }


def _lowest_row_cosine(golden: np.ndarray, features: np.ndarray) -> float:
    width = golden.shape[-1]
    rows = compare_rows(golden.reshape(-1, width), features.reshape(-1, width))
    return float(rows["cosine"].min())


def _milliseconds(session: VisionSession, pixels: np.ndarray) -> float:
    start = time.perf_counter()
    session.encode(pixels)
    return 1000 * (time.perf_counter() - start)
