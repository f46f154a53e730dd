"""How far a candidate's numbers are from the reference's.

Takes two float arrays, returns float64 measures per row and their summary. Everything is computed
in float64 over all elements: golden zeros are not skipped, and nothing is sampled.
"""

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
TOP = 5


def cosine(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Cosine per row of [n, width] -> float64 [n]; two zero rows are equal (1), one zero row is not
    (0)."""
    reference_norm = np.linalg.norm(reference, axis=1)
    candidate_norm = np.linalg.norm(candidate, axis=1)
    norms = reference_norm * candidate_norm
    both_zero = (reference_norm == 0) & (candidate_norm == 0)
    with np.errstate(invalid="ignore"):
        dot = np.sum(reference * candidate, axis=1)
        return np.where(both_zero, 1.0, dot / np.where(norms == 0, 1.0, norms))


def kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(candidate)) per row of logits [n, vocab] -> float64 [n], in
    nats."""
    p = log_softmax(reference)
    q = log_softmax(candidate)
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=1), 0.0)  # rounding may leave -1e-17


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Per row of logits [n, vocab], in the dtype of the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare_rows(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """Per row of two arrays [n, width]: {"cosine", "max_abs", "mean_abs", "mean_square",
    "max_relative", "mean_relative", "relative_euclidean", "elements", "nonfinite"}, each [n].

    Relative errors are |error| / |reference|; where the reference is (nearly) zero, / the row's
    largest value times the fp32 epsilon. relative_euclidean: norm of the error / norm of the
    reference. nonfinite counts NaN and Inf on both sides; such a row's other measures are NaN.
    ValueError if the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, candidate {candidate.shape}")
    rows, width = reference.shape
    nonfinite = np.sum(~np.isfinite(reference), axis=1) + np.sum(~np.isfinite(candidate), axis=1)
    a = _float64_with(np.nan, nonfinite > 0, reference)
    b = _float64_with(np.nan, nonfinite > 0, candidate)
    error = np.abs(a - b)
    size = np.abs(a)
    smallest_size = np.maximum(size.max(axis=1, keepdims=True) * EPSILON, TINY)
    relative = error / np.maximum(size, smallest_size)
    norm = np.maximum(np.linalg.norm(a, axis=1), TINY)
    return {
        "cosine": cosine(a, b),
        "max_abs": error.max(axis=1),
        "mean_abs": error.mean(axis=1),
        "mean_square": np.mean(error**2, axis=1),
        "max_relative": relative.max(axis=1),
        "mean_relative": relative.mean(axis=1),
        "relative_euclidean": np.linalg.norm(error, axis=1) / norm,
        "elements": np.full(rows, width),
        "nonfinite": nonfinite,
    }


def compare_logits(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """compare_rows of logits [n, vocab], and {"kl", "reference_top1", "candidate_top1", "agree",
    "top5", "reference_loss", "candidate_loss"}, each [n].

    top5: share of the reference's five best tokens among the candidate's five. losses: -log
    p(reference_top1), in nats.
    """
    measures = compare_rows(reference, candidate)
    bad = measures["nonfinite"] > 0
    a = _float64_with(0.0, bad, reference)
    b = _float64_with(0.0, bad, candidate)
    reference_top1 = reference.argmax(axis=1)
    candidate_top1 = candidate.argmax(axis=1)
    return {
        **measures,
        "kl": np.where(bad, np.nan, kl(a, b)),
        "reference_top1": reference_top1,
        "candidate_top1": candidate_top1,
        "agree": (reference_top1 == candidate_top1) & ~bad,
        "top5": np.where(bad, 0.0, shared_tops(a, b)),
        "reference_loss": np.where(bad, np.nan, _losses(a, reference_top1)),
        "candidate_loss": np.where(bad, np.nan, _losses(b, reference_top1)),
    }


def _float64_with(value: float, bad: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """rows [n, width] as float64, those that are `bad` [n] filled with the value."""
    return np.where(bad[:, None], value, rows).astype(np.float64)


def _losses(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """-log p of one token [n] per row of logits [n, vocab] -> [n], in nats."""
    return -np.take_along_axis(log_softmax(logits), token_ids[:, None], 1)[:, 0]


def shared_tops(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Share of each row's TOP largest elements that both arrays [n, vocab] have -> [n]."""
    count = min(TOP, a.shape[1])
    best_a = np.argpartition(-a, count - 1, axis=1)[:, :count].tolist()
    best_b = np.argpartition(-b, count - 1, axis=1)[:, :count].tolist()
    return np.array([len(set(x) & set(y)) / count for x, y in zip(best_a, best_b)])


def concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Measures of several comparisons, one behind the other: measure -> [all rows]; {} of no
    comparison."""
    if not parts:
        return {}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarize(parts: list[dict[str, np.ndarray]]) -> dict:
    """One number per measure over the rows of several comparisons; {"rows": 0} when nothing was
    compared.

    "worst" is where the smallest cosine (or the first NaN) is: {"case": which part, "row": which of
    its rows}.
    """
    rows = concatenate(parts)
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
