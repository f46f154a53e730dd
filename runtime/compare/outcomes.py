"""What one side of a comparison computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Outcome:
    """What one side says about one case. features float32 [rows, hidden], logits float32 [len(token_ids), vocab]."""

    ids: list[int]
    features: np.ndarray
    token_ids: list[int]
    answer: str
    logits: np.ndarray
    streams: object = None  # layers.Recorder, of the reference


@dataclass
class Noise:
    """What rounding alone does: the reference in the candidate's dtype, its layers as Side's, its logits of every question."""

    layers: dict
    logits: list[np.ndarray]


@dataclass
class Side:
    """One model's outcomes, its family (for token texts) and what the report tells about it; layers as
    layers.judge takes them, or a note why there are none."""

    info: dict
    family: object
    outcomes: list[Outcome]
    layers: dict | None = None
    noise: Noise | None = None
    note: str | None = None
    answers: list[str] = field(default_factory=list)  # to the data set
