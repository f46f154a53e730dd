"""How far a candidate's numbers are from the reference's: two float arrays in, float64 measures out.

Everything is computed in float64 over all elements: golden zeros are not skipped, and nothing is sampled.
"""

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
TOP = 5


def cosine(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Cosine per row of [n, width] -> float64 [n]; two zero rows are equal (1), one zero row is not (0)."""
    norms = np.linalg.norm(reference, axis=1), np.linalg.norm(candidate, axis=1)
    product = norms[0] * norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    with np.errstate(invalid="ignore"):
        return np.where(
            both_zero,
            1.0,
            np.sum(reference * candidate, axis=1) / np.where(product == 0, 1.0, product),
        )


def kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(candidate)) per row of logits [n, vocab] -> float64 [n], in nats."""
    p = log_softmax(reference)
    q = log_softmax(candidate)
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=1), 0.0)  # rounding may leave -1e-17


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare_rows(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """Per row of two arrays [n, width]: {"cosine", "max_abs", "mean_abs", "mean_square", "max_relative", "mean_relative",
    "relative_euclidean", "elements", "nonfinite"}, each [n].

    Relative errors are |error| / |reference|; where the reference is (nearly) zero, / the row's largest value times the
    fp32 epsilon. relative_euclidean: norm of the error / norm of the reference. nonfinite counts NaN and Inf on both sides;
    such a row's other measures are NaN. ValueError if the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, candidate {candidate.shape}")
    rows, width = reference.shape
    bad = np.sum(~np.isfinite(reference), axis=1) + np.sum(~np.isfinite(candidate), axis=1)
    a, b = (
        np.where((bad == 0)[:, None], x, np.nan).astype(np.float64) for x in (reference, candidate)
    )
    error = np.abs(a - b)
    size = np.abs(a)
    relative = error / np.maximum(size, np.maximum(size.max(axis=1, keepdims=True) * EPSILON, TINY))
    return {
        "cosine": cosine(a, b),
        "max_abs": error.max(axis=1),
        "mean_abs": error.mean(axis=1),
        "mean_square": np.mean(error**2, axis=1),
        "max_relative": relative.max(axis=1),
        "mean_relative": relative.mean(axis=1),
        "relative_euclidean": np.linalg.norm(error, axis=1)
        / np.maximum(np.linalg.norm(a, axis=1), TINY),
        "elements": np.full(rows, width),
        "nonfinite": bad,
    }


def compare_logits(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """compare_rows of logits [n, vocab], and {"kl", "reference_top1", "candidate_top1", "agree", "top5", "reference_loss",
    "candidate_loss"}, each [n].

    top5: share of the reference's five best tokens among the candidate's five. losses: -log p(reference_top1), in nats.
    """
    measures = compare_rows(reference, candidate)
    bad = measures["nonfinite"] > 0
    a, b = (np.where(bad[:, None], 0.0, x).astype(np.float64) for x in (reference, candidate))
    tops = reference.argmax(axis=1), candidate.argmax(axis=1)
    losses = (
        np.where(bad, np.nan, -np.take_along_axis(log_softmax(x), tops[0][:, None], 1)[:, 0])
        for x in (a, b)
    )
    return {
        **measures,
        "kl": np.where(bad, np.nan, kl(a, b)),
        "reference_top1": tops[0],
        "candidate_top1": tops[1],
        "agree": (tops[0] == tops[1]) & ~bad,
        "top5": np.where(bad, 0.0, shared_tops(a, b)),
        **dict(zip(("reference_loss", "candidate_loss"), losses)),
    }


def shared_tops(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Share of each row's TOP largest elements that are the same in both arrays [n, vocab] -> [n]."""
    count = min(TOP, a.shape[1])
    best = (np.argpartition(-x, count - 1, axis=1)[:, :count] for x in (a, b))
    return np.array(
        [len(set(x) & set(y)) / count for x, y in zip(*(part.tolist() for part in best))]
    )


def summarize(parts: list[dict[str, np.ndarray]]) -> dict:
    """One number per measure over the rows of several comparisons; {"rows": 0} when nothing was compared.

    "worst" is where the smallest cosine (or the first NaN) is: {"case": which part, "row": which of its rows}.
    """
    rows = {
        name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())
    }
    if not len(rows.get("cosine", ())):
        return {"rows": 0}
    counts = [len(part["cosine"]) for part in parts]
    part, row = _locate(int(rows["cosine"].argmin()), counts)  # argmin takes a NaN for the smallest
    found = {
        "rows": sum(counts),
        "elements": int(rows["elements"].sum()),
        "nonfinite": int(rows["nonfinite"].sum()),
        "cosine_min": float(rows["cosine"].min()),
        "cosine_mean": float(rows["cosine"].mean()),
        "max_abs": float(rows["max_abs"].max()),
        "mean_abs": float(np.average(rows["mean_abs"], weights=rows["elements"])),
        "rmse": float(np.sqrt(np.average(rows["mean_square"], weights=rows["elements"]))),
        "max_relative": float(rows["max_relative"].max()),
        "mean_relative": float(np.average(rows["mean_relative"], weights=rows["elements"])),
        "relative_euclidean": float(rows["relative_euclidean"].max()),
        "worst": {"case": part, "row": row},
    }
    if "kl" in rows:
        found |= {
            "kl_max": float(rows["kl"].max()),
            "kl_mean": float(rows["kl"].mean()),
            "top1_agreement": float(rows["agree"].mean()),
            "top5_agreement": float(rows["top5"].mean()),
            "reference_perplexity": float(np.exp(rows["reference_loss"].mean())),
            "candidate_perplexity": float(np.exp(rows["candidate_loss"].mean())),
        }
    return found


def _locate(index: int, counts: list[int]) -> tuple[int, int]:
    """Index into concatenated parts -> (part, index in the part)."""
    part = 0
    while index >= counts[part]:
        index = index - counts[part]
        part = part + 1
    return part, index
