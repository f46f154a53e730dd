"""Finds the layers that must stay float: the reference's weights are put back, layer by layer,
until the candidate passes.

Takes the candidate's engine, the reference's weights in the candidate's operators, and what the
layers were judged by; returns a small set of stages and the flags that keep them: `--keep-float` of
`python -m quant` where the weights differ, `--keep-dtype` of the candidate where only fp16 or bf16
is to blame. A bisection over the stages, the worst first, finds how many of them must go back; then
each of these is tried without. Both models are in memory.
"""

import gc
import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.checkpoint.table import WeightTable
from models.family import Family, Prompt
from models.network.decoder import LINEARS
from models.network.linear import as_float32
from runtime.common import metrics
from runtime.common.progress import spinner
from runtime.compare.cases import Case
from runtime.compare.limits import is_within
from runtime.compare.options import CompareOptions
from runtime.compare.outcomes import Outcome
from runtime.compare.runs import dtype_of, encode, load
from runtime.engine.command import open_engine
from runtime.engine.options import EngineOptions

PARTS = {
    "attention": ("attention_norm", "qkv", "out", "attention_post_norm"),
    "mlp": ("mlp_norm", "up", "down", "mlp_post_norm"),
}


def find(
    options: CompareOptions,
    engine_options: EngineOptions,
    cases: list[Case],
    outcomes: list[Outcome],
    found: dict,
) -> dict:
    """{"stages", "flags", "trials", "sentence"} for a candidate whose logits fail; outcomes: the
    reference's."""
    gc.collect()
    make = partial(open_engine, options=engine_options)
    candidate, _ = load("search: candidate", options.model, make)
    same_weights = engine_options.cpu_weights == "float" and Path(options.model).samefile(
        options.reference
    )
    dtype = dtype_of(candidate)
    only_dtype = same_weights and dtype != "float32"
    if only_dtype:
        dtype = "float32"
    float_options = replace(engine_options, dtype=dtype, cpu_weights="float")
    make = partial(open_engine, options=float_options)
    floats, _ = load("search: reference", options.reference, make)
    prompts, _ = encode(candidate, cases)
    limits = _logit_limits(found["checks"])
    with spinner("searching"):
        search = Search(candidate, floats, prompts, outcomes, limits, only_dtype)
        stages = search.run(ranked(found["layers"]))
        return report(candidate.family, stages, search.trials, only_dtype)


def _logit_limits(checks: list[dict]) -> dict[str, float]:
    """Measure -> limit."""
    return {c["measure"]: c["limit"] for c in checks if c["stage"] == "decode"}


@dataclass
class Search:
    """candidate, floats: engines; only_dtype: floats is the same checkpoint in float32. prompts,
    outcomes: of every question. limits: measure -> limit of the logits."""

    candidate: object
    floats: object
    prompts: list[Prompt]
    outcomes: list[Outcome]
    limits: dict[str, float]
    only_dtype: bool = False
    trials: int = 0

    def __post_init__(self):
        self.own_layers = list(self.candidate.layers())

    def run(self, ranked: list[str]) -> list[str] | None:
        """Stages, the worst first -> the smallest set found whose return to float makes the logits
        pass; None if all do not.

        The first half of the search supposes that more float layers are never worse, the second
        supposes nothing.
        """
        if not self.passes(ranked):
            return None
        low = 0
        high = len(ranked)  # the first `high` suffice
        while high - low > 1:
            middle = (low + high) // 2
            if self.passes(ranked[:middle]):
                high = middle
            else:
                low = middle
        return self._without_needless(ranked[:high])

    def _without_needless(self, kept: list[str]) -> list[str]:
        """Each stage is tried without, but for the last, which is needed: without it the bisection
        had failed."""
        for stage in kept[:-1]:
            fewer = [other for other in kept if other != stage]
            if self.passes(fewer):
                kept = fewer
        return kept

    def passes(self, stages: list[str]) -> bool:
        """Whether the logits are within the limits with these stages in float."""
        self.trials += 1
        self._put_back(stages)
        parts = []
        for prompt, outcome in zip(self.prompts, self.outcomes):
            logits = self.candidate.score(prompt, outcome.token_ids)
            parts.append(metrics.compare_logits(outcome.logits, logits))
        found = metrics.summarize(parts)
        return all(is_within(name, found[name], limit) for name, limit in self.limits.items())

    def _put_back(self, stages: list[str]):
        layers = self.candidate.layers()
        layers[:] = self.own_layers
        for stage in stages:
            index, branch = place_of(stage)
            weights = self._float_weights(self.floats.layers()[index], PARTS[branch])
            layers[index] = replace(layers[index], **weights)

    def _float_weights(self, layer, names: tuple[str, ...]) -> dict:
        """Fields of a layer that take part; where only the dtype differs, the linear layers in
        float32."""
        if not self.only_dtype:
            return {name: getattr(layer, name) for name in names}
        dtype = self.candidate.plan.dtype
        linears = [name for name in names if name in LINEARS]
        return {name: as_float32(name, getattr(layer, name), dtype) for name in linears}


def place_of(stage: str) -> tuple[int, str]:
    """layers.3.mlp -> (3, "mlp")"""
    _, index, branch = stage.split(".")
    return int(index), branch


def ranked(layers: list[dict]) -> list[str]:
    """The decoder's stages, the largest error of its own first; NaN counts as the largest."""
    errors = {}
    for stage in layers:
        if stage["stage"].startswith("layers."):
            is_number = stage["relative"] >= 0
            errors[stage["stage"]] = stage["relative"] if is_number else float("inf")
    return sorted(errors, key=errors.get, reverse=True)


def flags(family: Family, stages: list[str]) -> str:
    """The linear layers of these stages by their names in the checkpoint, as flags of `python -m
    quant`."""
    table = WeightTable(family.weights())
    names = []
    for stage in stages:
        index, branch = place_of(stage)
        for part in PARTS[branch]:
            if part in LINEARS:
                names += table.sources_of(f"layers.{index}.{part}.weight")
    names = [name.removesuffix(".weight") for name in dict.fromkeys(names)]
    return " ".join(f"--keep-float {shlex.quote(name)}" for name in names)


def report(family: Family, stages: list[str] | None, trials: int, only_dtype: bool) -> dict:
    """{"stages", "flags", "trials", "sentence"}"""
    if stages is None:
        sentence = (
            "no set of layers helps: with all of them float it fails too; "
            "look at the embedding, the logits and the pictures"
        )
        return {"stages": [], "flags": "", "trials": trials, "sentence": sentence}
    if only_dtype:
        kind = "float32"
        given = " ".join(f"--keep-dtype {shlex.quote(stage)}" for stage in stages)
    else:
        kind = "float"
        given = flags(family, stages)
    sentence = f"it passes with {', '.join(stages)} in {kind}: {given}"
    return {"stages": stages, "flags": given, "trials": trials, "sentence": sentence}
