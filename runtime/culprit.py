"""Which layers have to stay float: a candidate that fails gets the reference's weights back, layer by layer, until it passes.

In flow the candidate's engine, the reference's weights in the candidate's dtype and operators, and what the layers were
judged by; out flows a small set of stages and the `--keep-float` flags that keep them. A bisection over the stages, the
worst first, finds how many of them must go back; then each of these is tried without. Both models are in memory.
"""
from dataclasses import dataclass, replace

from . import metrics
from .limits import AT_LEAST

PARTS = {"attention": ("attention_norm", "qkv", "out"), "mlp": ("mlp_norm", "up", "down")}
LINEARS = ("qkv", "out", "up", "down")


@dataclass
class Search:
    """candidate, floats: engines. prompts, outcomes: of every question. limits: measure -> limit of the logits."""
    candidate: object
    floats: object
    prompts: list
    outcomes: list
    limits: dict[str, float]
    trials: int = 0

    def __post_init__(self):
        self.own = list(self.candidate.layers())

    def run(self, ranked: list[str]) -> list[str] | None:
        """Stages, the worst first -> the smallest set found whose return to float makes the logits pass; None if all do not.

        The first half of the search supposes that more float layers are never worse, the second supposes nothing.
        """
        if not self.passes(ranked):
            return None
        low, high = 0, len(ranked)              # the first `high` suffice
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.passes(ranked[:middle]) else (middle, high)
        kept = ranked[:high]
        for stage in ranked[:high - 1]:         # the last one is needed: without it the bisection had failed
            fewer = [k for k in kept if k != stage]
            kept = fewer if self.passes(fewer) else kept
        return kept

    def passes(self, stages: list[str]) -> bool:
        self.trials += 1
        self.put_back(stages)
        parts = [metrics.compare_logits(outcome.logits, self.candidate.score(prompt, outcome.token_ids))
                 for prompt, outcome in zip(self.prompts, self.outcomes)]
        found = metrics.summarize(parts)
        return all(found[m] >= limit if m in AT_LEAST else found[m] <= limit for m, limit in self.limits.items())

    def put_back(self, stages: list[str]):
        layers = self.candidate.layers()
        layers[:] = self.own
        for stage in stages:
            _, index, branch = stage.split(".")
            index = int(index)
            layers[index] = replace(layers[index], **{part: getattr(self.floats.layers()[index], part)
                                                      for part in PARTS[branch]})


def ranked(layers: list[dict]) -> list[str]:
    """The decoder's stages, the largest error of its own first; NaN counts as the largest."""
    errors = {s["stage"]: s["relative"] for s in layers if s["stage"].startswith("layers.")}
    return sorted(errors, key=lambda stage: errors[stage] if errors[stage] >= 0 else float("inf"), reverse=True)


def flags(family, stages: list[str]) -> str:
    """The linear layers of these stages by their names in the checkpoint, as flags of `python -m quant`."""
    targets = [f"layers.{stage.split('.')[1]}.{part}.weight" for stage in stages
               for part in PARTS[stage.rpartition(".")[2]] if part in LINEARS]
    names = [w.source.removesuffix(".weight") for target in targets for w in family.weights()
             if any(part.target == target for part in w.parts)]
    return " ".join(f"--keep-float {name}" for name in dict.fromkeys(names))


def report(family, stages: list[str] | None, trials: int) -> dict:
    """{"stages", "flags", "trials", "sentence"}"""
    if stages is None:
        sentence = ("no set of layers helps: with all of them float it fails too; look at the embedding, the logits and the "
                    "pictures")
        return {"stages": [], "flags": "", "trials": trials, "sentence": sentence}
    return {"stages": stages, "flags": flags(family, stages), "trials": trials,
            "sentence": f"it passes with {', '.join(stages)} in float: {flags(family, stages)}"}
