"""From the outcomes of both sides to the findings of the report: measures, the checks that decide, one sentence.

A check is {"stage", "measure", "value", "limit", "passed", "nonfinite", "worst"}: where the worst value stands.
"""

from runtime.common import metrics
from runtime.compare.report.sentences import chinese, verdict

from . import layerwise as layers
from .limits import AT_LEAST, EXACT
from .report import page as report

FP32_DISTANCE, OM_DISTANCE = 1e-5, 0.05  # measured: 9e-7; msit's for an .om


def judge(reference, candidate, cases: list, limits: dict[str, dict[str, float]]) -> dict:
    """The report: summary per stage, the checks that decide, every layer, case and token. Layout: docs/compare.md."""
    pairs = list(zip(reference.outcomes, candidate.outcomes))
    vision = [metrics.compare_rows(a.features, b.features) for a, b in pairs]
    decode = [metrics.compare_logits(a.logits, b.logits) for a, b in pairs]
    stages = {"vision": metrics.summarize(vision), "decode": metrics.summarize(decode)}
    noise = candidate.noise
    found = (
        layers.judge(candidate.layers, noise and noise.layers, limits["layers"])
        if candidate.layers
        else []
    )
    limits = {
        "vision": {"relative_euclidean": vision_limit(candidate.info), **limits["vision"]},
        "decode": with_rounding(limits["decode"], reference, noise),
    }
    checks = [
        check(name, stage, *limit)
        for name, stage in stages.items()
        if stage["rows"]
        for limit in limits[name].items()
    ]
    checks += [layer_check(found)] if found else []
    passed = bool(stages["decode"]["rows"]) and all(c["passed"] for c in checks)
    return {
        "schema": report.SCHEMA,
        "passed": passed,
        "verdict": verdict(passed, checks),
        "verdict_zh": chinese(passed, checks),
        "checks": checks,
        "histogram": histogram(pairs),
        "stages": stages,
        "layers": found,
        "layers_note": candidate.note,
        "reference": reference.info,
        "candidate": candidate.info,
        "cases": [
            describe_case(*four, candidate.family)
            for four in zip(cases, reference.outcomes, vision, decode)
        ],
    }


def vision_limit(info: dict) -> float:
    """Largest relative Euclidean distance of a picture row: an .om computes in fp16, everything else in fp32."""
    return (
        OM_DISTANCE
        if any(stage.startswith("vision: om") for stage in info["stages"])
        else FP32_DISTANCE
    )


def with_rounding(limits: dict[str, float], reference, noise) -> dict[str, float]:
    """The decoder's limits with a cosine where none was given: 0.9999, or what rounding alone leaves in this dtype; bf16 is
    below that on some models, and a candidate cannot be better than its dtype."""
    if "cosine_min" in limits:
        return limits
    if noise is None:
        return {"cosine_min": EXACT, **limits}
    pairs = [metrics.compare_rows(a.logits, b) for a, b in zip(reference.outcomes, noise.logits)]
    lost = 1 - metrics.summarize(pairs)["cosine_min"]
    return {
        "cosine_min": min(EXACT, 1 - layers.NOISE**2 * lost),
        **limits,
    }  # 1 - cosine grows as error squared


def check(name: str, stage: dict, measure: str, limit: float) -> dict:
    """NaN is never within a limit."""
    value = stage[measure]
    return {
        "stage": name,
        "measure": measure,
        "value": value,
        "limit": limit,
        "passed": value >= limit if measure in AT_LEAST else value <= limit,
        "nonfinite": stage["nonfinite"],
        "worst": stage["worst"],
    }


def layer_check(found: list[dict]) -> dict:
    """Decided by the first stage that is outside its limits; without one, told about the one that is nearest to them."""
    failed = [stage for stage in found if not stage["passed"]]
    shown = failed[0] if failed else max(found, key=lambda s: s["relative"] / s["limit"])
    by_gain = shown["relative"] <= shown["limit"] and not shown["passed"]
    return {
        "stage": "layers",
        "measure": "gain" if by_gain else "relative",
        "value": shown["gain" if by_gain else "relative"],
        "limit": shown["gain_limit" if by_gain else "limit"],
        "passed": not failed,
        "nonfinite": shown["nonfinite"],
        "worst": {"stage": shown["stage"]},
        "failed": [stage["stage"] for stage in failed],
    }


def histogram(pairs) -> dict:
    """How many logits are off by which power of ten: {"edges" [n + 1], "counts" [n]}; equal ones are left out."""
    import numpy as np

    edges = np.arange(-9, 3.01, 0.5)
    counts = np.zeros(len(edges) - 1, np.int64)
    for a, b in pairs:
        error = np.abs(a.logits.astype(np.float64) - b.logits)
        error = error[np.isfinite(error) & (error > 0)]
        counts += np.histogram(np.clip(np.log10(error), edges[0], edges[-1]), edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def describe_case(case, expected, vision: dict, decode: dict, family) -> dict:
    agree = decode["agree"].tolist()
    return {
        "question": case.question,
        "language": case.language,
        "pictures": len(case.pictures),
        "prompt_tokens": len(expected.ids),
        "answer": expected.answer,
        "same_answer": all(agree),
        "vision": metrics.summarize([vision]),
        "decode": metrics.summarize([decode]),
        "tokens": [describe_token(decode, row, family) for row in range(len(agree))],
    }


def describe_token(decode: dict, row: int, family) -> dict:
    token = {name: decode[name][row].item() for name in decode}
    return {
        "text": token_text(family, token["reference_top1"]),
        "candidate_text": token_text(family, token["candidate_top1"]),
        **token,
    }


def token_text(family, token_id: int) -> str:
    return "<stop>" if token_id in family.stop_ids else family.tokenizer.decode([token_id])
