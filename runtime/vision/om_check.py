"""Whether an .om computes what torch does.

Takes a session of the .om and the Source it stands for, returns a Verdict: measured on a few drawn
pictures when the two meet for the first time, and remembered by the hashes of both.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.errors import ModelError
from models.family import Family
from runtime.common.errors import ToolkitError
from runtime.common.files import cache_folder, open_private, write_atomically
from runtime.common.files.checksums import sha256_of
from runtime.common.metrics import compare_rows
from runtime.common.notes import note
from runtime.common.sample_questions import EXAMPLES

from .artifact import WEIGHTS
from .choose import open_torch
from .session import VisionSession
from .source import Source

DISTANCE = 0.05  # largest |om - golden| / |golden| of all features, beside the family's cosine


@dataclass(frozen=True)
class Verdict:
    """cosine: the lowest of all rows. distance: relative, of all features. problem: why nothing
    could be measured."""

    passed: bool
    cosine: float | None = None
    distance: float | None = None
    problem: str | None = None

    def describe(self, family: Family) -> str:
        if self.problem:
            return self.problem
        return (
            f"lowest row cosine {self.cosine:.6f} (limit {family.encoder_cosine}), distance "
            f"{self.distance:.2g} (limit {DISTANCE})"
        )


def judge(family: Family, golden: np.ndarray, features: np.ndarray) -> Verdict:
    """Features of an .om against what they should be, both [rows of all images, hidden]."""
    width = golden.shape[-1]
    rows = compare_rows(golden.reshape(-1, width), features.reshape(-1, width))
    cosine = float(rows["cosine"].min())
    distance = float(np.linalg.norm(features - golden) / np.linalg.norm(golden))
    passed = bool(golden.size and cosine >= family.encoder_cosine and distance <= DISTANCE)
    return Verdict(passed, cosine, distance)


def verdict_of(session: VisionSession, om: Path, source: Source) -> Verdict:
    """The remembered verdict, else one that is measured now against torch, which may take a
    minute."""
    known = _read(_record(om, source))
    if known:
        return known
    note(f"{om} is used for the first time with this checkpoint: comparing it with torch")
    verdict = _measure(session, source)
    with suppress(OSError):  # a cache that cannot be written only costs time
        remember(verdict, om, source)
    return verdict


def remember(verdict: Verdict, om: Path, source: Source):
    """OSError when the cache cannot be written."""
    write_atomically(_record(om, source), json.dumps(asdict(verdict)) + "\n")


def _measure(session: VisionSession, source: Source) -> Verdict:
    family = source.family
    pictures = [family.pixels(question.scene()) for question in EXAMPLES]
    try:
        features = np.concatenate(session.encode_all(pictures))
    except ToolkitError as error:  # NaN or Inf
        return Verdict(False, problem=str(error))
    golden = np.concatenate(open_torch(family, source.checkpoint).encode_all(pictures))
    return judge(family, golden, features)


def _record(om: Path, source: Source) -> Path:
    """Named after the contents of the .om, of weights beside it, and of the encoder."""
    digest = hashlib.sha256(source.hash.encode())
    for file in (om, *sorted((om.parent / WEIGHTS).glob("*"))):
        digest.update(sha256_of(file).encode())
    return cache_folder("om") / f"{digest.hexdigest()[:32]}.json"


def _read(record: Path) -> Verdict | None:
    try:
        with open_private(record) as stream:
            return Verdict(**json.load(stream))
    except (OSError, ValueError, TypeError, ModelError):
        return None
