"""Whether an .om computes what the ONNX graph does.

Takes a session on a device, returns the record of an attempt.
"""

import time

import numpy as np

from convert.verify.images import verification_pictures
from models.family import Family
from runtime.common.errors import ToolkitError
from runtime.vision.om_check import judge
from runtime.vision.session import VisionSession

RUNS = 5  # timed, after one that is not


def measure_om(family: Family, session: VisionSession, golden: np.ndarray, mode: str) -> dict:
    """Record of the .om against the features `golden`, float32 [rows of all images, hidden].

    {mode, passed, cosine (lowest of all rows), distance (relative), latency_ms (per image)};
    of an .om that gives NaN or Inf {mode, passed, error}.
    """
    pictures = list(verification_pictures(family).values())
    try:
        features = np.concatenate(session.encode_all(pictures))
        latency = float(np.median([_milliseconds(session, pictures[:1]) for _ in range(RUNS)]))
    except ToolkitError as error:  # NaN or Inf
        print(f"verify OM {mode}: {error}: FAIL")
        return {"mode": mode, "passed": False, "error": str(error)}
    verdict = judge(family, golden, features)
    print(
        f"verify OM {mode}: {verdict.describe(family)}, {latency:.2f} ms: "
        f"{'pass' if verdict.passed else 'FAIL'}"
    )
    return {
        "mode": mode,
        "passed": verdict.passed,
        "cosine": verdict.cosine,
        "distance": verdict.distance,
        "latency_ms": latency,
    }


def _milliseconds(session: VisionSession, pictures: list) -> float:
    start = time.perf_counter()
    session.encode_all(pictures)
    return 1000 * (time.perf_counter() - start)
