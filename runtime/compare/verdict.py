"""Whether a candidate passes.

Takes the outcomes of both sides, returns the findings of the report: measures per stage, the checks
that decide, one sentence. A check is {"stage", "measure", "value", "limit", "passed", "nonfinite",
"worst"}; worst: where the worst value stands.
"""

import numpy as np

from models.family import Family
from runtime.common import metrics
from runtime.compare.report.page import SCHEMA

from .cases import Case
from .layers import layerwise
from .limits import EXACT, QUANTISED, is_within
from .outcomes import Noise, Outcome, Side
from .report import sentences

FP32_DISTANCE = 1e-5  # largest relative Euclidean distance of an image row (measured: 9e-7)
OM_DISTANCE = 0.05  # the same for an .om, which computes in fp16: msit's limit
POWERS = np.arange(-9, 3.01, 0.5)  # edges of the histogram of errors, as powers of ten

Measures = dict[str, np.ndarray]  # of metrics.compare_rows or compare_logits, each [rows]


def judge(
    reference: Side, candidate: Side, cases: list[Case], limits: dict, scales: dict | None = None
) -> dict:
    """The findings: summary per stage, the checks that decide, every layer, case and token (keys:
    docs/compare.md).

    limits: stage -> measure -> limit, as `limits.all_limits` returns them. scales: as
    `scales.judge_scales` returns them.
    """
    pairs = list(zip(reference.outcomes, candidate.outcomes))
    vision = [metrics.compare_rows(expected.features, found.features) for expected, found in pairs]
    decode = [metrics.compare_logits(expected.logits, found.logits) for expected, found in pairs]
    stages = {"vision": metrics.summarize(vision), "decode": metrics.summarize(decode)}
    layers = _judge_layers(candidate, limits["layers"])
    limits = {
        "vision": {"relative_euclidean": vision_limit(candidate.info), **limits["vision"]},
        "decode": with_rounding(limits["decode"], reference, candidate.noise),
    }
    checks = [*stage_checks(stages, limits), *scale_checks(scales), *layer_checks(layers)]
    passed = bool(stages["decode"]["rows"]) and all(check["passed"] for check in checks)
    return {
        "schema": SCHEMA,
        "passed": passed,
        "verdict": sentences.english(passed, checks),
        "verdict_zh": sentences.chinese(passed, checks),
        "checks": checks,
        "histogram": histogram(pairs),
        "stages": stages,
        "layers": layers,
        "layers_note": candidate.note,
        "scales": scales,
        "reference": reference.info,
        "candidate": candidate.info,
        "cases": [
            describe_case(*four, candidate.family)
            for four in zip(cases, reference.outcomes, vision, decode)
        ],
    }


def _judge_layers(candidate: Side, limits: dict[str, float]) -> list[dict]:
    if not candidate.layers:
        return []
    noise = candidate.noise.layers if candidate.noise else None
    return layerwise.judge(candidate.layers, noise, limits)


def vision_limit(info: dict) -> float:
    """Largest relative Euclidean distance of an image row: an .om computes in fp16, everything else
    in fp32."""
    if any(stage.startswith("vision: om") for stage in info["stages"]):
        return OM_DISTANCE
    return FP32_DISTANCE


def with_rounding(
    limits: dict[str, float], reference: Side, noise: Noise | None
) -> dict[str, float]:
    """The decoder's limits, with a cosine where none was given and no 8 bits are judged: 0.9999, or
    what rounding alone leaves in this dtype.

    bf16 is below 0.9999 on some models, and a candidate cannot be better than its dtype.
    """
    if "cosine_min" in limits or QUANTISED.keys() <= limits.keys():
        return limits
    if noise is None:
        return {"cosine_min": EXACT, **limits}
    pairs = zip(reference.outcomes, noise.logits)
    rows = [metrics.compare_rows(outcome.logits, rounded) for outcome, rounded in pairs]
    lost = 1 - metrics.summarize(rows)["cosine_min"]
    allowed = layerwise.NOISE**2 * lost  # 1 - cosine grows as error squared
    return {"cosine_min": min(EXACT, 1 - allowed), **limits}


def stage_checks(stages: dict[str, dict], limits: dict[str, dict[str, float]]) -> list[dict]:
    """One check for every limit of a stage of which anything was compared."""
    checks = []
    for name, stage in stages.items():
        if stage["rows"]:
            for measure, limit in limits[name].items():
                checks.append(_check(name, stage, measure, limit))
    return checks


def _check(name: str, stage: dict, measure: str, limit: float) -> dict:
    return {
        "stage": name,
        "measure": measure,
        "value": stage[measure],
        "limit": limit,
        "passed": is_within(measure, stage[measure], limit),
        "nonfinite": stage["nonfinite"],
        "worst": stage["worst"],
    }


def scale_checks(scales: dict | None) -> list[dict]:
    """At most one check: of the int8 layer whose scales are farthest from its weights."""
    if not scales or not scales["worst"]:
        return []
    worst = scales["worst"]
    check = {
        "stage": "scales",
        "measure": worst["measure"],
        "value": worst["value"],
        "limit": worst["limit"],
        "passed": not scales["failed"],
        "nonfinite": 0,
        "worst": {"stage": worst["layer"], "row": worst["row"], "against": worst["against"]},
        "failed": [fault["layer"] for fault in scales["failed"]],
        "judged": scales["judged"],
    }
    return [check]


def layer_checks(layers: list[dict]) -> list[dict]:
    """At most one check: of the first stage outside its limits, or, if all pass, of the one closest
    to its limit."""
    if not layers:
        return []
    failed = [stage for stage in layers if not stage["passed"]]
    if failed:
        shown = failed[0]
    else:
        shown = max(layers, key=lambda stage: stage["relative"] / stage["limit"])
    by_gain = shown["relative"] <= shown["limit"] and not shown["passed"]
    measure, limit = ("gain", "gain_limit") if by_gain else ("relative", "limit")
    check = {
        "stage": "layers",
        "measure": measure,
        "value": shown[measure],
        "limit": shown[limit],
        "passed": not failed,
        "nonfinite": shown["nonfinite"],
        "worst": {"stage": shown["stage"]},
        "failed": [stage["stage"] for stage in failed],
    }
    return [check]


def histogram(pairs: list[tuple[Outcome, Outcome]]) -> dict:
    """How many logits deviate by which power of ten: {"edges" [n + 1], "counts" [n]}; equal ones
    are left out."""
    counts = np.zeros(len(POWERS) - 1, np.int64)
    for expected, found in pairs:
        error = np.abs(expected.logits.astype(np.float64) - found.logits)
        error = error[np.isfinite(error) & (error > 0)]
        powers = np.clip(np.log10(error), POWERS[0], POWERS[-1])
        counts += np.histogram(powers, POWERS)[0]
    return {"edges": POWERS.tolist(), "counts": counts.tolist()}


def describe_case(
    case: Case, expected: Outcome, vision: Measures, decode: Measures, family: Family
) -> dict:
    """One question of the report, with every token."""
    agree = decode["agree"].tolist()
    return {
        "question": case.question,
        "language": case.language,
        "pictures": len(case.images),
        "prompt_tokens": len(expected.ids),
        "answer": expected.answer,
        "same_answer": all(agree),
        "vision": metrics.summarize([vision]),
        "decode": metrics.summarize([decode]),
        "tokens": [_describe_token(decode, row, family) for row in range(len(agree))],
    }


def _describe_token(decode: Measures, row: int, family: Family) -> dict:
    token = {name: values[row].item() for name, values in decode.items()}
    return {
        "text": _token_text(family, token["reference_top1"]),
        "candidate_text": _token_text(family, token["candidate_top1"]),
        **token,
    }


def _token_text(family: Family, token_id: int) -> str:
    if token_id in family.stop_ids:
        return "<stop>"
    return family.tokenizer.decode([token_id])
