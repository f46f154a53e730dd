"""The verdict of a comparison in words, English and Chinese."""

from runtime.compare.limits import AT_LEAST

from . import formats

STAGES = {"vision": "vision features", "decode": "decoder logits"}


def verdict(passed: bool, checks: list[dict]) -> str:
    """One sentence: the smallest cosine of every stage, or what failed where, the layer first."""
    if not any(c["stage"] == "decode" for c in checks):
        return "FAILED: nothing was compared"
    if passed:
        cosines = [c for c in checks if c["measure"] == "cosine_min"]
        smallest = ", ".join(f"{STAGES[c['stage']]} {formats.cosine(c['value'])}" for c in cosines)
        limits = " or ".join(dict.fromkeys(f"{c['limit']:g}" for c in cosines))
        clean = (
            "; every layer computes what the reference's does"
            if checks[-1]["stage"] == "layers"
            else ""
        )
        return f"PASSED: no cosine is below {limits}; smallest: {smallest}{clean}"
    failed = sorted((c for c in checks if not c["passed"]), key=lambda c: c["stage"] != "layers")
    return "FAILED: " + "; ".join(
        layer_failure(c) if c["stage"] == "layers" else failure(c) for c in failed
    )


CHINESE = {"vision": "视觉特征", "decode": "解码器 logits"}


def chinese(passed: bool, checks: list[dict]) -> str:
    """The same sentence for the page in Chinese."""
    if not any(c["stage"] == "decode" for c in checks):
        return "没有可比较的内容"
    if passed:
        return "；".join(
            f"{CHINESE[c['stage']]}的最小余弦为 {formats.cosine(c['value'])}（限值 {c['limit']:.6g}）"
            for c in checks
            if c["measure"] == "cosine_min"
        )
    failed = sorted((c for c in checks if not c["passed"]), key=lambda c: c["stage"] != "layers")
    return "；".join(chinese_failure(c) for c in failed)


def chinese_failure(c: dict) -> str:
    value = (
        formats.cosine(c["value"]) if c["measure"] == "cosine_min" else formats.number(c["value"])
    )
    if c["stage"] == "layers":
        what = (
            "首先出现 NaN 或 Inf"
            if c["nonfinite"]
            else f"首先偏离：{'增益' if c['measure'] == 'gain' else '误差'}为 {c['value']:.4g}，限值 {c['limit']:.4g}"
        )
        return f"{c['worst']['stage']} {what}（共 {len(c['failed'])} 个阶段偏离）"
    place = f"问题 {c['worst']['case'] + 1} 第 {c['worst']['row'] + 1} {'个词元' if c['stage'] == 'decode' else '行'}"
    if c["nonfinite"]:
        return f"{CHINESE[c['stage']]}含 {c['nonfinite']} 个 NaN 或 Inf，首个位于{place}"
    return f"{CHINESE[c['stage']]}的 {c['measure']} 为 {value}（{place}），限值 {c['limit']:.6g}"


def layer_failure(c: dict) -> str:
    others = f", {len(c['failed']) - 1} more stages depart too" if len(c["failed"]) > 1 else ""
    if c["nonfinite"]:
        return f"{c['worst']['stage']} is the first with NaN or Inf ({c['nonfinite']:,} values){others}"
    if c["measure"] == "gain":
        return (
            f"{c['worst']['stage']} departs first: what it adds is {c['value']:.4f} times the reference's, "
            f"{c['limit']:g} from plain torch in this dtype are allowed{others}"
        )
    return (
        f"{c['worst']['stage']} departs first: its error is {c['value']:.2e} of what it adds, above "
        f"{c['limit']:.2e}{others}"
    )


def failure(c: dict) -> str:
    what = STAGES[c["stage"]]
    row = c["worst"]["row"] + 1
    question = c["worst"]["case"] + 1
    place = f"{'token' if c['stage'] == 'decode' else 'row'} {row} of question {question}"
    if c["nonfinite"]:
        return f"{c['nonfinite']:,} values of the {what} are NaN or Inf, the first at {place}"
    if c["measure"] == "cosine_min":
        return f"the cosine of the {what} falls to {formats.cosine(c['value'])} at {place}, below {c['limit']:g}"
    side = "below" if c["measure"] in AT_LEAST else "above"
    return f"{c['measure']} of the {what} is {c['value']:.3g} at {place}, {side} {c['limit']:g}"
