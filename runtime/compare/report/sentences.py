"""The verdict of a comparison in words.

Takes the checks of `compare.verdict`, returns one line of text per language. Each language is a
table of templates; a failed check chooses one of them by its kind.
"""

from dataclasses import dataclass

from runtime.compare.limits import AT_LEAST

from . import formats


@dataclass(frozen=True)
class Wording:
    """Templates of one language.

    features: stage -> what is compared there. places: stage -> where its worst value stands.
    failures: kind of a failed check (`kind_of`) -> sentence. failed: the whole verdict, of which
    `{failures}` are joined with `between`. more_stages: what a sentence about the layers ends with
    when several of them deviate.
    """

    features: dict[str, str]
    places: dict[str, str]
    failures: dict[str, str]
    failed: str
    between: str
    more_stages: str
    nothing: str


ENGLISH = Wording(
    features={"vision": "vision features", "decode": "decoder logits"},
    places={
        "vision": "row {row} of question {question}",
        "decode": "token {row} of question {question}",
    },
    failures={
        "layers nonfinite": "{stage} is the first with NaN or Inf ({nonfinite:,} values){more}",
        "layers gain": "{stage} deviates first: what it adds is {value:.4f} times the reference's, "
        "{limit:g} from plain torch in this dtype are allowed{more}",
        "layers relative": "{stage} deviates first: its error is {value:.2e} of what it adds, above "
        "{limit:.2e}{more}",
        "scales": "the scales of {layer} do not fit: {times} times what {against} give{more}",
        "bias": "quant_bias of {layer} is {steps:+.1f} from what {against} give{more}",
        "rounding": "a weight in {layer} is {steps:.1f} steps from {against}, half a step is what "
        "rounding leaves{more}",
        "nonfinite": "{nonfinite:,} values of the {features} are NaN or Inf, the first at {place}",
        "cosine": "the cosine of the {features} falls to {shown} at {place}, below {limit:g}",
        "too small": "{measure} of the {features} is {value:.3g} at {place}, below {limit:g}",
        "too large": "{measure} of the {features} is {value:.3g} at {place}, above {limit:g}",
    },
    failed="FAILED: {failures}",
    between="; ",
    more_stages=", {others} more stages depart too",
    nothing="FAILED: nothing was compared",
)

FIRST = {"scales": 0, "layers": 1}  # the order in which failures are told: causes first
OFF_LIMIT_CHINESE = "{features}的 {measure} 为 {shown}（{place}），限值 {limit:.6g}"
CHINESE = Wording(
    features={"vision": "视觉特征", "decode": "解码器 logits"},
    places={
        "vision": "问题 {question} 第 {row} 行",
        "decode": "问题 {question} 第 {row} 个词元",
    },
    failures={
        "layers nonfinite": "{stage} 首先出现 NaN 或 Inf（共 {stages} 个阶段偏离）",
        "layers gain": "{stage} 首先偏离：增益为 {value:.4g}，限值 {limit:.4g}（共 {stages} 个阶段偏离）",
        "layers relative": "{stage} 首先偏离：误差为 {value:.4g}，限值 {limit:.4g}（共 {stages} 个阶段偏离）",
        "scales": "{layer} 的量化比例不符：为应有值的 {times} 倍（共 {count} 层）",
        "bias": "{layer} 的 quant_bias 偏差 {steps:+.1f}（共 {count} 层）",
        "rounding": "{layer} 中有权重偏离参考 {steps:.1f} 步，舍入最多半步（共 {count} 层）",
        "nonfinite": "{features}含 {nonfinite} 个 NaN 或 Inf，首个位于{place}",
        "cosine": OFF_LIMIT_CHINESE,
        "too small": OFF_LIMIT_CHINESE,
        "too large": OFF_LIMIT_CHINESE,
    },
    failed="{failures}",
    between="；",
    more_stages="",
    nothing="没有可比较的内容",
)


def english(passed: bool, checks: list[dict]) -> str:
    """One sentence: the smallest cosine of every stage, or what failed where, the layers first."""
    if passed:
        return _passed_english(checks)
    return _failed(ENGLISH, checks)


def chinese(passed: bool, checks: list[dict]) -> str:
    """The same for the page in Chinese."""
    if passed:
        return _passed_chinese(checks)
    return _failed(CHINESE, checks)


def _passed_english(checks: list[dict]) -> str:
    limits = []
    smallest = []
    for check in _cosines(checks):
        limits.append(f"{check['limit']:g}")
        smallest.append(f"{ENGLISH.features[check['stage']]} {formats.cosine(check['value'])}")
    parts = []
    gate = _gate(checks)
    if smallest:
        limits = " or ".join(dict.fromkeys(limits))
        judged = " of the vision features" if gate else ""  # the gate judges the logits
        parts.append(f"no cosine{judged} is below {limits}; smallest: {', '.join(smallest)}")
    if gate:
        parts.append("within the limits of python -m quant: KL {}, top-1 {}".format(*gate))
    sentence = f"PASSED: {'; '.join(parts)}"
    for check in checks:
        if check["stage"] == "scales":
            sentence += f"; the scales of {check['judged']} int8 layers fit their weights"
    if checks[-1]["stage"] == "layers":
        sentence += _layers_english(bool(gate))
    return sentence


def _layers_english(rounded: bool) -> str:
    if rounded:
        return "; no layer's error is above what rounding its weights may cost"
    return "; every layer computes what the reference's does"


def _passed_chinese(checks: list[dict]) -> str:
    parts = []
    for check in _cosines(checks):
        features = CHINESE.features[check["stage"]]
        value = formats.cosine(check["value"])
        parts.append(f"{features}的最小余弦为 {value}（限值 {check['limit']:.6g}）")
    if gate := _gate(checks):
        parts.append("满足 python -m quant 的限值：KL {}，top-1 {}".format(*gate))
    return CHINESE.between.join(parts)


def _gate(checks: list[dict]) -> tuple[str, str] | None:
    """(mean KL, top-1 agreement) of the logits with their limits, where these decide."""
    found = {}
    for check in checks:
        if check["stage"] == "decode":
            found[check["measure"]] = check
    if "kl_mean" not in found or "top1_agreement" not in found:
        return None
    kl = found["kl_mean"]
    top1 = found["top1_agreement"]
    return (
        f"{kl['value']:.3g} (at most {kl['limit']:g})",
        f"{top1['value']:.1%} (at least {top1['limit']:.1%})",
    )


def _cosines(checks: list[dict]) -> list[dict]:
    return [check for check in checks if check["measure"] == "cosine_min"]


def _failed(wording: Wording, checks: list[dict]) -> str:
    if not any(check["stage"] == "decode" for check in checks):
        return wording.nothing
    failed = [check for check in checks if not check["passed"]]
    failed.sort(key=lambda check: FIRST.get(check["stage"], len(FIRST)))
    failures = wording.between.join(_failure(wording, check) for check in failed)
    return wording.failed.format(failures=failures)


def _failure(wording: Wording, check: dict) -> str:
    if check["stage"] == "layers":
        values = _layer_values(wording, check)
    elif check["stage"] == "scales":
        values = _scale_values(check)
    else:
        values = _stage_values(wording, check)
    return wording.failures[kind_of(check)].format(**values)


def kind_of(check: dict) -> str:
    """Which of the templates `Wording.failures` describes a failed check."""
    if check["stage"] == "layers":
        kind = "nonfinite" if check["nonfinite"] else check["measure"]
        return f"layers {kind}"
    if check["stage"] == "scales":
        return check["measure"].replace("gain", "scales")
    if check["nonfinite"]:
        return "nonfinite"
    if check["measure"] == "cosine_min":
        return "cosine"
    return "too small" if check["measure"] in AT_LEAST else "too large"


def _layer_values(wording: Wording, check: dict) -> dict:
    """What the templates "layers ..." name."""
    stages = len(check["failed"])
    more = wording.more_stages.format(others=stages - 1) if stages > 1 else ""
    return {**check, "stage": check["worst"]["stage"], "stages": stages, "more": more}


def _scale_values(check: dict) -> dict:
    """What the template "scales" names."""
    worst = check["worst"]
    layer = worst["stage"]
    if worst["row"] is not None:
        layer = f"row {worst['row'] + 1} of {layer}"
    others = len(check["failed"]) - 1
    more = f"; {others} more layers do not fit either" if others else ""
    words = {"layer": layer, "more": more, "against": worst["against"]}
    times = f"{check['value']:.4f}"
    count = len(check["failed"])
    return {**words, "times": times, "steps": check["value"] - 1, "count": count}


def _stage_values(wording: Wording, check: dict) -> dict:
    """What the other templates name. `shown`: the value as the tables of the report show it."""
    stage = check["stage"]
    show = formats.cosine if check["measure"] == "cosine_min" else formats.number
    place = wording.places[stage].format(
        row=check["worst"]["row"] + 1, question=check["worst"]["case"] + 1
    )
    features = wording.features[stage]
    return {**check, "features": features, "place": place, "shown": show(check["value"])}
