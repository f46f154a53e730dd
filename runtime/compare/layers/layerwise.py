"""Which layer deviates.

Takes a question and two engines, returns measures of every stage of the candidate's decoder, each
computed from the reference's own input. The reference writes the residual stream behind every stage
to a file while it scores a question (`RecordingTap`); the candidate then scores the same tokens,
and each of its stages gets the reference's stream in place of its own (`ReplayTap`). So an error
shows in the stage that makes it and nowhere behind it. Stages: the embedding (with the image rows),
the attention and the MLP of every layer, the final norm, and the logits.
"""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from models.files import named, open_own
from runtime.common import metrics

HALF_MAX = 65504.0  # the largest fp16 number
HEAD = "lm_head"
# fp32 roundings in one stage: its matmuls sum in another order (measured: 1 to 5)
SINGLE = 24 * 2.0**-24
NOISE = 1.5  # a candidate's error against that of plain torch in its dtype (measured: 0.99 to 1.02)
GAIN = 0.002  # rounding has no direction (measured: within 0.0001 of plain torch in its dtype)
SINGLE_GAIN = 5e-7  # the same in fp32 (measured: 2e-8)


class RecordingTap:
    """Writes the streams of one question to a file, float32 [stages, tokens, hidden]: a full-size
    model's would fill the memory."""

    def __init__(self, path: Path, stages: list[str], tokens: int, hidden: int):
        self.stages = {stage: index for index, stage in enumerate(stages)}
        shape = (len(stages), tokens, hidden)
        self.values = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        with named(path), open_own(path) as file:
            # a full disk ends here in an error; found while the map is written, it ends the process
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        path.unlink()  # lives on as long as it is mapped, and not a moment longer
        self.num_recorded = Counter()  # stage -> tokens

    def __call__(self, stage: str, x: torch.Tensor) -> torch.Tensor:
        """Records x [tokens, hidden] behind the stage and returns it unchanged."""
        start = self.num_recorded[stage]
        self.num_recorded[stage] += len(x)
        rows = slice(start, start + len(x))
        self.values[self.stages[stage], rows] = x.float().cpu().numpy()
        return x


class ReplayTap:
    """Compares each stage's stream with the recorded one and hands on the recorded one. Image rows,
    which are judged as vision features, count as equal."""

    def __init__(self, recording: RecordingTap, image_rows: list[slice]):
        self.recording = recording
        self.image_rows = image_rows
        self.num_compared = Counter()  # stage -> tokens
        self.measures = {}  # stage -> [measures of each call]

    def __call__(self, stage: str, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] behind the candidate's stage -> what the reference has there."""
        start = self.num_compared[stage]
        self.num_compared[stage] += len(x)
        rows = slice(start, start + len(x))
        index = self.recording.stages[stage]
        expected = np.array(self.recording.values[index, rows])
        added_to = 0.0
        if stage.startswith("layers."):
            added_to = np.array(self.recording.values[index - 1, rows])
        found = x.float().cpu().numpy()
        if stage == "embed":
            self._equate_images(found, expected, start)
        self.measures.setdefault(stage, []).append(measure(expected, found, added_to))
        return torch.from_numpy(expected).to(x)

    def _equate_images(self, found: np.ndarray, expected: np.ndarray, start: int):
        """Overwrites the image rows of `found`, whose first row is token `start`, by the expected
        ones."""
        for image in self.image_rows:
            span = slice(max(image.start - start, 0), max(image.stop - start, 0))
            found[span] = expected[span]


def record(engine, prompt, token_ids: list[int], path: Path) -> tuple[np.ndarray, RecordingTap]:
    """(logits as of engine.score, the streams behind every stage meanwhile)."""
    tokens = len(prompt.ids) + len(token_ids) - 1
    recording = RecordingTap(path, engine.tap(), tokens, engine.family.decoder.hidden)
    return _tapped_score(engine, recording, prompt, token_ids), recording


def compare_stages(
    engine, prompt, token_ids: list[int], recording: RecordingTap, logits: np.ndarray
) -> dict[str, list]:
    """Stage -> measures of what it computes from the recorded stream before it; logits [n, vocab]
    are the reference's."""
    replay = ReplayTap(recording, engine.family.image_rows(prompt))
    found = _tapped_score(engine, replay, prompt, token_ids)
    return {**replay.measures, HEAD: [measure(logits, found)]}


def _tapped_score(engine, tap, prompt, token_ids: list[int]) -> np.ndarray:
    engine.tap(tap)
    try:
        return engine.score(prompt, token_ids)
    finally:
        engine.tap(None)


def measure(expected: np.ndarray, found: np.ndarray, added_to=0.0) -> dict[str, np.ndarray]:
    """metrics.compare_rows of two streams [n, hidden], and per row: {"relative", "scale", "gain",
    "largest"}.

    relative: error / what the stage adds to the stream. scale: 1 + stream / what it adds, how much
    a rounding of the sum weighs in that. gain: what the candidate adds, as a multiple of what the
    reference adds. largest: absolute value.
    """
    measures = metrics.compare_rows(expected, found)
    is_finite = (measures["nonfinite"] == 0)[:, None]
    reference = np.where(is_finite, expected, np.nan).astype(np.float64)
    candidate = np.where(is_finite, found, np.nan).astype(np.float64)
    start = np.where(is_finite, added_to, np.nan).astype(np.float64)
    added = reference - start
    size = np.linalg.norm(added, axis=1)
    size = np.where(size == 0, np.finfo(np.float32).tiny, size)
    largest = np.abs(expected).max(axis=1)
    largest_found = np.nan_to_num(np.abs(found), posinf=np.inf).max(axis=1)
    return {
        **measures,
        "relative": np.linalg.norm(candidate - reference, axis=1) / size,
        "scale": 1 + np.linalg.norm(reference, axis=1) / size,
        "gain": np.sum(added * (candidate - start), axis=1) / size**2,
        "largest": np.maximum(largest, largest_found),
    }


def merge(parts: list[dict[str, list]]) -> dict[str, dict]:
    """Measures of every question, as of `compare_stages` -> stage -> summary over all of them."""
    merged = {}
    for stage in parts[0]:
        calls = []
        for question in parts:
            calls.extend(question[stage])
        merged[stage] = _summary(calls)
    return merged


def _summary(parts: list[dict[str, np.ndarray]]) -> dict:
    """One number per measure over all tokens of a stage."""
    rows = metrics.concatenate(parts)
    largest = float(rows["largest"].max())
    return {
        **metrics.summarize(parts),
        "relative": float(np.sqrt(np.mean(rows["relative"] ** 2))),
        "scale": float(np.sqrt(np.mean(rows["scale"] ** 2))),
        "gain": float(rows["gain"].mean()),
        "largest": largest,
        "headroom": HALF_MAX / max(largest, 1e-30),
    }


def judge(
    found: dict[str, dict], noise: dict[str, dict] | None, limits: dict[str, float]
) -> list[dict]:
    """Every stage with its limits and whether it is within them; `limits` holds those that are
    given: relative, gain.

    noise: the same stages of plain torch in the candidate's dtype, against the same reference;
    None: it computes in fp32.
    """
    judged = []
    for stage, measures in found.items():
        stage_noise = noise[stage] if noise else None
        judged.append({"stage": stage, **_judged(measures, stage_noise, limits)})
    return judged


def _judged(measures: dict, noise: dict | None, limits: dict[str, float]) -> dict:
    limit = SINGLE * _finite(measures["scale"], 1.0)
    gain_limit = SINGLE_GAIN
    gain = 1.0
    if noise:
        limit = max(limit, NOISE * _finite(noise["relative"], 0.0))
        gain_limit = GAIN
        gain = _finite(noise["gain"], 1.0)
    limit = limits.get("relative", limit)
    gain_limit = limits.get("gain", gain_limit)
    passed = measures["relative"] <= limit and abs(measures["gain"] - gain) <= gain_limit
    return {**measures, "limit": limit, "gain_limit": gain_limit, "passed": bool(passed)}


def _finite(value: float, otherwise: float) -> float:
    """Plain torch in fp16 overflows too where a model does not fit it; a limit is a number all the
    same."""
    return value if math.isfinite(value) else otherwise
