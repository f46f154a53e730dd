"""How far a candidate's numbers are from the reference's: two float arrays in, float64 measures out.

Everything is computed in float64 over all elements: golden zeros are not skipped, and nothing is sampled.
"""
import numpy as np


def cosine(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Cosine per row of [n, width] -> float64 [n]; two zero rows are equal (1), one zero row is not (0)."""
    norms = np.linalg.norm(reference, axis=1), np.linalg.norm(candidate, axis=1)
    product = norms[0] * norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    with np.errstate(invalid="ignore"):
        return np.where(both_zero, 1.0, np.sum(reference * candidate, axis=1) / np.where(product == 0, 1.0, product))


def kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(candidate)) per row of logits [n, vocab] -> float64 [n], in nats."""
    p, q = log_softmax(reference), log_softmax(candidate)
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=1), 0.0)     # rounding may leave -1e-17


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare_rows(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """Measures of every row of two arrays [n, width]: {"cosine", "max_abs", "mean_abs", "nonfinite"}, each [n].

    nonfinite counts NaN and Inf on either side; such a row's other measures are NaN. ValueError if the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, candidate {candidate.shape}")
    bad = np.sum(~np.isfinite(reference), axis=1) + np.sum(~np.isfinite(candidate), axis=1)
    a, b = (np.where((bad == 0)[:, None], x, np.nan).astype(np.float64) for x in (reference, candidate))
    error = np.abs(a - b)
    return {"cosine": cosine(a, b), "max_abs": error.max(axis=1), "mean_abs": error.mean(axis=1), "nonfinite": bad}


def compare_logits(reference: np.ndarray, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """compare_rows of logits [n, vocab], and {"kl", "reference_top1", "candidate_top1", "agree"}, each [n]."""
    measures = compare_rows(reference, candidate)
    bad = (measures["nonfinite"] > 0)[:, None]
    a, b = (np.where(bad, 0.0, x).astype(np.float64) for x in (reference, candidate))
    tops = reference.argmax(axis=1), candidate.argmax(axis=1)
    return {**measures, "kl": np.where(bad[:, 0], np.nan, kl(a, b)), "reference_top1": tops[0],
            "candidate_top1": tops[1], "agree": (tops[0] == tops[1]) & ~bad[:, 0]}


def join(measures: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of several comparisons as one."""
    return {name: np.concatenate([m[name] for m in measures]) for name in measures[0]} if measures else {}


def summarize(measures: dict[str, np.ndarray], widths: int) -> dict[str, float | int]:
    """One number per measure for all rows together, each `widths` wide; {"rows": 0} when nothing was compared."""
    rows = len(measures.get("cosine", ()))
    if not rows:
        return {"rows": 0}
    found = {"rows": rows, "elements": rows * widths, "nonfinite": int(measures["nonfinite"].sum()),
             "cosine_min": float(measures["cosine"].min()), "cosine_mean": float(measures["cosine"].mean()),
             "max_abs": float(measures["max_abs"].max()), "mean_abs": float(measures["mean_abs"].mean())}
    if "kl" in measures:
        found |= {"kl_max": float(measures["kl"].max()), "kl_mean": float(measures["kl"].mean()),
                  "top1_agreement": float(measures["agree"].mean())}
    return found
