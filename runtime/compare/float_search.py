"""Which layers have to stay float: a candidate that fails gets the reference's weights back, layer by layer, until it passes.

In flow the candidate's engine, the reference's weights in the candidate's operators, and what the layers were judged by;
out flows a small set of stages and the flags that keep them: `--keep-float` of `python -m quant` where the weights differ,
`--keep-dtype` of the candidate where only fp16 or bf16 is to blame. A bisection over the stages, the worst first, finds how
many of them must go back; then each of these is tried without. Both models are in memory.
"""

import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.checkpoint.table import WeightTable
from runtime.common import metrics
from runtime.common.progress import spinner

from .limits import AT_LEAST

PARTS = {"attention": ("attention_norm", "qkv", "out"), "mlp": ("mlp_norm", "up", "down")}
LINEARS = ("qkv", "out", "up", "down")


def find(options, candidate_options, cases: list, reference, found: dict) -> dict | None:
    """What `report` tells; None where the logits pass or no layers were compared. options: of compare."""
    from runtime import Engine

    from .runs import encode, load

    limits = {c["measure"]: c["limit"] for c in found["checks"] if c["stage"] == "decode"}
    if not found["layers"] or all(c["passed"] for c in found["checks"] if c["stage"] == "decode"):
        return None
    gc.collect()
    engine, _ = load("search: candidate", options.model, partial(Engine, **vars(candidate_options)))
    dtype = str(engine.plan.dtype).split(".")[1]
    wide = (
        dtype != "float32"
        and candidate_options.cpu_weights == "float"
        and Path(options.model).samefile(options.reference)
    )
    floats, _ = load(
        "search: reference",
        options.reference,
        partial(
            Engine,
            **vars(candidate_options)
            | {"dtype": "float32" if wide else dtype, "cpu_weights": "float"},
        ),
    )
    prompts, _ = encode(engine, cases)
    with spinner("searching"):
        search = Search(engine, floats, prompts, reference.outcomes, limits, wide)
        return report(engine.family, search.run(ranked(found["layers"])), search.trials, wide)


@dataclass
class Search:
    """candidate, floats: engines; wide: floats is the same checkpoint in float32. prompts, outcomes: of every question.
    limits: measure -> limit of the logits."""

    candidate: object
    floats: object
    prompts: list
    outcomes: list
    limits: dict[str, float]
    wide: bool = False
    trials: int = 0

    def __post_init__(self):
        self.own = list(self.candidate.layers())

    def run(self, ranked: list[str]) -> list[str] | None:
        """Stages, the worst first -> the smallest set found whose return to float makes the logits pass; None if all do not.

        The first half of the search supposes that more float layers are never worse, the second supposes nothing.
        """
        if not self.passes(ranked):
            return None
        low = 0
        high = len(ranked)  # the first `high` suffice
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.passes(ranked[:middle]) else (middle, high)
        kept = ranked[:high]
        for stage in ranked[
            : high - 1
        ]:  # the last one is needed: without it the bisection had failed
            fewer = [k for k in kept if k != stage]
            kept = fewer if self.passes(fewer) else kept
        return kept

    def passes(self, stages: list[str]) -> bool:
        self.trials += 1
        self.put_back(stages)
        parts = [
            metrics.compare_logits(outcome.logits, self.candidate.score(prompt, outcome.token_ids))
            for prompt, outcome in zip(self.prompts, self.outcomes)
        ]
        found = metrics.summarize(parts)
        return all(
            found[m] >= limit if m in AT_LEAST else found[m] <= limit
            for m, limit in self.limits.items()
        )

    def put_back(self, stages: list[str]):
        layers = self.candidate.layers()
        layers[:] = self.own
        for stage in stages:
            index, branch = place_of(stage)
            layers[index] = replace(
                layers[index], **self._parts(self.floats.layers()[index], PARTS[branch])
            )

    def _parts(self, layer, names) -> dict:
        from models.network.linear import widened

        if self.wide:
            return {
                name: widened(name, getattr(layer, name), self.candidate.plan.dtype)
                for name in names
                if name in LINEARS
            }
        return {name: getattr(layer, name) for name in names}


def place_of(stage: str) -> tuple[int, str]:
    """layers.3.mlp -> (3, "mlp")"""
    _, index, branch = stage.split(".")
    return int(index), branch


def ranked(layers: list[dict]) -> list[str]:
    """The decoder's stages, the largest error of its own first; NaN counts as the largest."""
    errors = {s["stage"]: s["relative"] for s in layers if s["stage"].startswith("layers.")}
    return sorted(
        errors,
        key=lambda stage: errors[stage] if errors[stage] >= 0 else float("inf"),
        reverse=True,
    )


def flags(family, stages: list[str]) -> str:
    """The linear layers of these stages by their names in the checkpoint, as flags of `python -m quant`."""
    table = WeightTable(family.weights())
    names = []
    for stage in stages:
        index, branch = place_of(stage)
        for part in (name for name in PARTS[branch] if name in LINEARS):
            sources = table.sources_of(f"layers.{index}.{part}.weight")
            names += [source.removesuffix(".weight") for source in sources]
    return " ".join(f"--keep-float {name}" for name in dict.fromkeys(names))


def report(family, stages: list[str] | None, trials: int, wide: bool = False) -> dict:
    """{"stages", "flags", "trials", "sentence"}"""
    if stages is None:
        sentence = (
            "no set of layers helps: with all of them float it fails too; look at the embedding, the logits and the "
            "pictures"
        )
        return {"stages": [], "flags": "", "trials": trials, "sentence": sentence}
    given = " ".join(f"--keep-dtype {stage}" for stage in stages) if wide else flags(family, stages)
    return {
        "stages": stages,
        "flags": given,
        "trials": trials,
        "sentence": f"it passes with {', '.join(stages)} in {'float32' if wide else 'float'}: {given}",
    }
