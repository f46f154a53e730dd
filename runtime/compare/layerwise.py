"""Which layer departs: every stage of the candidate's decoder, fed with what the reference's stage before it gave.

The reference writes the residual stream behind every stage to a file while it scores a question (`Recorder`); the
candidate then scores the same tokens, and each of its stages gets the reference's stream in place of its own (`Prompter`).
So an error shows in the stage that makes it and nowhere behind it. Stages: the embedding (with the picture rows), the
attention and the MLP of every layer, the final norm, and the logits.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from runtime.common import metrics

HALF_MAX = 65504.0  # the largest fp16 number
HEAD = "lm_head"
SINGLE = (
    24 * 2.0**-24
)  # fp32 roundings in one stage: sums of products in another order (measured: 1 to 5)
NOISE = 1.5  # a candidate's error against that of plain torch in the same dtype (measured: 0.99 to 1.02)
GAIN = 0.002  # rounding has no direction (measured: within 0.0001 of plain torch in the same dtype)
SINGLE_GAIN = 5e-7  # the same in fp32 (measured: 2e-8)


class Recorder:
    """The streams of one question, float32 [stages, tokens, hidden] in a file: a full-size model's would fill the memory."""

    def __init__(self, path: Path, stages: list[str], tokens: int, hidden: int):
        self.stages = {stage: index for index, stage in enumerate(stages)}
        self.values = np.lib.format.open_memmap(
            path, "w+", np.float32, (len(stages), tokens, hidden)
        )
        path.unlink()  # lives on as long as it is mapped, and not a moment longer
        self.done = Counter()

    def __call__(self, stage, x):
        self.values[self.stages[stage], self.done[stage] : self.done[stage] + len(x)] = (
            x.float().cpu().numpy()
        )
        self.done[stage] += len(x)
        return x


class Prompter:
    """Compares each stage's stream with the recorded one and hands on the recorded one; picture rows, which are judged as
    vision features, count as equal."""

    def __init__(self, recorder: Recorder, pictures: list[slice]):
        self.recorder = recorder
        self.done = Counter()
        self.parts = {}
        self.pictures = pictures

    def __call__(self, stage, x):
        import torch

        index = self.recorder.stages[stage]
        rows = slice(self.done[stage], self.done[stage] + len(x))
        expected = np.array(self.recorder.values[index, rows])
        added_to = (
            np.array(self.recorder.values[index - 1, rows]) if stage.startswith("layers.") else 0.0
        )
        self.done[stage] += len(x)
        self.parts.setdefault(stage, []).append(
            measure(expected, self._own(stage, x, rows, expected), added_to)
        )
        return torch.from_numpy(expected).to(x)

    def _own(self, stage, x, rows, expected):
        """What the candidate's own decoder computed."""
        found = x.float().cpu().numpy()
        for picture in self.pictures if stage == "embed" else ():
            span = slice(max(picture.start - rows.start, 0), max(picture.stop - rows.start, 0))
            found[span] = expected[span]
        return found


def record(engine, prompt, token_ids, path: Path) -> tuple[np.ndarray, Recorder]:
    """engine.score, and the streams behind every stage meanwhile."""
    recorder = Recorder(
        path, engine.tap(), len(prompt.ids) + len(token_ids) - 1, engine.family.decoder.hidden
    )
    return _tapped_score(engine, recorder, prompt, token_ids), recorder


def prompt_stages(
    engine, prompt, token_ids, recorder: Recorder, logits: np.ndarray
) -> dict[str, list]:
    """Stage -> measures of what it computes from the recorded stream before it; logits [n, vocab] are the reference's."""
    rows = engine.family.vision.output_shape[1] if prompt.pixels else 0
    prompter = Prompter(
        recorder, [slice(start, start + rows) for start in prompt.layout.image_starts]
    )
    found = _tapped_score(engine, prompter, prompt, token_ids)
    return {**prompter.parts, HEAD: [measure(logits, found)]}


def _tapped_score(engine, tap, prompt, token_ids):
    engine.tap(tap)
    try:
        return engine.score(prompt, token_ids)
    finally:
        engine.tap(None)


def measure(expected: np.ndarray, found: np.ndarray, added_to=0.0) -> dict[str, np.ndarray]:
    """metrics.compare_rows of two streams [n, hidden], and per row: {"relative", "scale", "gain", "largest"}.

    relative: error / what the stage adds to the stream. scale: 1 + stream / what it adds, how much a rounding of the sum
    weighs in that. gain: what the candidate adds, as a multiple of what the reference adds. largest: absolute value.
    """
    measures = metrics.compare_rows(expected, found)
    good = measures["nonfinite"] == 0
    a, b, start = (
        np.where(good[:, None], x, np.nan).astype(np.float64)
        for x in (expected, found, np.broadcast_to(added_to, expected.shape))
    )
    added = a - start
    size = np.linalg.norm(a - start, axis=1)
    size = np.where(size == 0, np.finfo(np.float32).tiny, size)
    return {
        **measures,
        "relative": np.linalg.norm(b - a, axis=1) / size,
        "scale": 1 + np.linalg.norm(a, axis=1) / size,
        "gain": np.sum(added * (b - start), axis=1) / size**2,
        "largest": np.maximum(
            np.abs(expected).max(axis=1), np.nan_to_num(np.abs(found), posinf=np.inf).max(axis=1)
        ),
    }


def summary(parts: list[dict[str, np.ndarray]]) -> dict:
    """One number per measure over all tokens of a stage."""
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        **metrics.summarize(parts),
        "relative": float(np.sqrt(np.mean(rows["relative"] ** 2))),
        "scale": float(np.sqrt(np.mean(rows["scale"] ** 2))),
        "gain": float(rows["gain"].mean()),
        "largest": float(rows["largest"].max()),
        "headroom": HALF_MAX / max(float(rows["largest"].max()), 1e-30),
    }


def merge(parts: list[dict[str, list]]) -> dict[str, dict]:
    """Stage -> summary over the questions' measures."""
    return {
        stage: summary([part for question in parts for part in question[stage]])
        for stage in parts[0]
    }


def judge(
    found: dict[str, dict], noise: dict[str, dict] | None, limits: dict[str, float]
) -> list[dict]:
    """Every stage with its limits and whether it is within them; `limits` holds those that are given: relative, gain.

    noise: the same stages of plain torch in the candidate's dtype, against the same reference; None: it computes in fp32.
    """
    return [
        _judged(stage, measures, noise and noise[stage], limits)
        for stage, measures in found.items()
    ]


def finite(value: float, otherwise: float) -> float:
    """Plain torch in fp16 overflows too where a model does not fit it; a limit is a number all the same."""
    return value if math.isfinite(value) else otherwise


def _judged(stage, measures, noise, limits) -> dict:
    level = SINGLE * finite(measures["scale"], 1.0)
    limit = limits.get(
        "relative", level if noise is None else max(level, NOISE * finite(noise["relative"], 0.0))
    )
    gain = limits.get("gain", SINGLE_GAIN if noise is None else GAIN)
    expected = finite(noise["gain"], 1.0) if noise else 1.0
    passed = measures["relative"] <= limit and abs(measures["gain"] - expected) <= gain
    return {"stage": stage, **measures, "limit": limit, "gain_limit": gain, "passed": bool(passed)}
