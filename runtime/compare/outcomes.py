"""What one side of a comparison computed: the values that runs.py hands to verdict.py."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.family import Family
from runtime.compare.layers.layerwise import RecordingTap


@dataclass
class Outcome:
    """One side's numbers of one case. features float32 [rows, hidden], logits float32
    [len(token_ids), vocab].

    token_ids: what was fed behind the prompt `ids`. streams: of the reference's decoder, where they
    were recorded.
    """

    ids: list[int]
    features: np.ndarray
    token_ids: list[int]
    answer: str
    logits: np.ndarray
    streams: RecordingTap | None = None


@dataclass
class Noise:
    """What rounding alone does: the reference in the candidate's dtype.

    layers: as Side's. logits: of every question, float32 [tokens, vocab].
    """

    layers: dict
    logits: list[np.ndarray]


@dataclass
class Side:
    """One model's outcomes, its family (for token texts) and what the report says about it.

    layers: stage -> measures, as layerwise.judge takes them; None where `note` says why there are
    none. unverified: the artifact or .om that encoded and was never compared with torch. answers:
    to the questions of the data set.
    """

    info: dict
    family: Family
    outcomes: list[Outcome]
    layers: dict | None = None
    noise: Noise | None = None
    note: str | None = None
    unverified: Path | None = None
    answers: list[str] = field(default_factory=list)
