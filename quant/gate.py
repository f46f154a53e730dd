"""Is the quantised model still the model? Next-token KL and top-1 agreement on held-out samples decide; where they do not
hold, the linear layers that hurt most go back to float, as few as will do.

A finished work folder flows in; the groups of linear layers that stay float, and the figures, flow out. The quantised side
is computed with the engine's integer arithmetic, layer by layer.
"""

import functools
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors.torch import load_file

from models.checkpoint.table import WeightTable
from models.network.decoder import norm_of
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.engine.loading.weights import load_rows
from runtime.ops.cpu.ops import CpuOps

from .layer_loop import integer_layer, relative_error, run, with_floats
from .layer_module import release_memory
from .work_folder import Job, Work

ROWS = 1 << 11  # rows of the output matrix multiplied at a time: buffers that malloc keeps
TOKENS = 32  # logits compared at a time, in float64


@dataclass
class Figures:
    """kl: mean KL(float || quantised) of the next token in nats; top1: share of tokens whose most likely successor is the
    same; tokens: how many were judged."""

    kl: float
    top1: float
    tokens: int

    def hold(self, max_kl: float, min_top1: float) -> bool:
        return self.kl <= max_kl and self.top1 >= min_top1


@dataclass
class Verdict:
    """`kept`: groups (layer, group) that went back to float, worst first; `tried`: {number of groups: figures}."""

    kept: list[tuple[int, str]]
    figures: Figures
    tried: dict[int, Figures]

    def report(self) -> dict:
        return {
            "kept_float": [f"layers.{i}.{group}" for i, group in self.kept],
            **asdict(self.figures),
            "tried": {str(n): asdict(f) for n, f in self.tried.items()},
        }


def pass_gate(job: Job, work: Work, max_kl: float, min_top1: float, say) -> Verdict:
    """The smallest number of groups, worst first, with which the figures hold; ToolkitError if none does."""
    streams = work.load_streams(job.layers)
    held = range(job.calibrating, len(job.samples))
    head = Head(job)
    ranking = Ranking(job, work)
    tried = {}
    expected = head.logits([streams["float"][i] for i in held])

    def holds(count: int) -> bool:
        found = (
            [streams["quantised"][i] for i in held]
            if count == 0
            else replay(job, work, ranking.worst(count))
        )
        tried[count] = figures(expected, head.logits(found))
        say(count, tried[count])
        return tried[count].hold(max_kl, min_top1)

    count = fewest(holds, len(ranking.quantised) - 1)  # at least one stays quantised
    if count is None:
        best = min(tried.values(), key=lambda f: f.kl)
        raise ToolkitError(
            f"the quality gate cannot be reached: KL {best.kl:.3g} (limit {max_kl:g}), top-1 {best.top1:.1%} "
            f"(at least {min_top1:.1%}); calibrate on text like yours with --calib, try --anti m2, or set "
            "--max-kl and --min-top1 (the layers are kept for that)",
            CHECK_FAILED,
        )
    return Verdict(ranking.worst(count), tried[count], tried)


def fewest(holds, limit: int) -> int | None:
    """Smallest count at which `holds`, which is assumed to stay so above it: doubling, then halving."""
    low = -1
    high = 0
    while not holds(high):
        if high >= limit:
            return None
        low = high
        high = min(max(1, 2 * high), limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class Ranking:
    """Groups of linear layers that are quantised, by the error that each alone causes in its layer; measured when asked."""

    def __init__(self, job: Job, work: Work):
        self._job = job
        self._work = work
        self.quantised = [
            (index, group)
            for index in range(job.layers)
            for group in quantised_groups(work.record(index))
        ]

    def worst(self, count: int) -> list[tuple[int, str]]:
        return self._ranked[:count] if count else []

    @functools.cached_property
    def _ranked(self):
        errors = self._errors()
        return sorted(self.quantised, key=errors.get, reverse=True)

    @torch.inference_mode()
    def _errors(self) -> dict[tuple[int, str], float]:
        """One pass of the held-out samples over the float model."""
        job = self._job
        errors = {}
        numbers = range(job.calibrating, len(job.samples))
        stream = [job.samples[i].stream for i in numbers]

        def outputs(index, kept):
            layer = integer_layer(job.family, index, *layer_parts(job, self._work, index, kept))
            return [run(job, layer, x, i) for x, i in zip(stream, numbers)]

        for index in range(job.layers):
            groups = [place for place in self.quantised if place[0] == index]
            after = outputs(index, groups)
            for place in groups:
                found = outputs(index, [other for other in groups if other != place])
                errors[place] = relative_error(*map(torch.cat, (after, found, stream)))
            stream = after
            release_memory()
        return errors


def quantised_groups(record) -> list[str]:
    return [
        group
        for group, names in record.groups.items()
        if any(record.kinds[f"{name}.weight"] != "FLOAT" for name in names)
    ]


def replay(job: Job, work: Work, kept: list[tuple[int, str]]) -> list[torch.Tensor]:
    """Held-out streams behind the last layer, with the groups `kept` in float."""
    numbers = range(job.calibrating, len(job.samples))
    streams = [job.samples[i].stream for i in numbers]
    for index in range(job.layers):
        layer = integer_layer(job.family, index, *layer_parts(job, work, index, kept))
        streams = [run(job, layer, x, i) for x, i in zip(streams, numbers)]
    return streams


def layer_parts(job: Job, work: Work, index: int, kept) -> tuple[dict, dict]:
    """(tensors, kinds) of a finished layer, the groups `kept` in float."""
    record = work.record(index)
    names = {name for i, group in kept if i == index for name in record.groups[group]}
    return with_floats(job, work, index, load_file(work.weights(index)), record.kinds, names)


class Head:
    """Final norm and output matrix, multiplied piece by piece."""

    def __init__(self, job: Job):
        family = job.family
        self.checkpoint = job.checkpoint
        table = WeightTable(family.weights())
        rows = [row for row in table.decoder() if row.target.module == "final_norm"]
        self.norm = norm_of(
            load_rows(self.checkpoint, rows, torch.float32, "cpu", CpuOps()), "final_norm"
        )
        self.eps = family.decoder.eps
        self.layer_norm = family.decoder.norm == "layer"
        self.source = table.source_of("lm_head.weight")

    @torch.inference_mode()
    def logits(self, streams: list[torch.Tensor]) -> np.ndarray:
        """float32 [tokens, vocab] of residual streams behind the last layer."""
        norm = CpuOps().layer_norm if self.layer_norm else CpuOps().rms_norm
        matrix = self.checkpoint.tensor(self.source)
        x = norm(torch.cat(streams), self.norm, self.eps)
        logits = np.empty((len(x), len(matrix)), np.float32)
        for start in range(0, len(matrix), ROWS):
            logits[:, start : start + ROWS] = torch.nn.functional.linear(
                x, matrix[start : start + ROWS].float()
            ).numpy()
        return logits


def figures(expected: np.ndarray, found: np.ndarray) -> Figures:
    """Of logits [tokens, vocab]."""
    kl = torch.cat(
        [
            _kl(*pair)
            for pair in zip(*(torch.from_numpy(x).split(TOKENS) for x in (expected, found)))
        ]
    )
    if not kl.isfinite().all():
        return Figures(float("inf"), 0.0, len(kl))
    return Figures(kl.mean().item(), float((expected.argmax(1) == found.argmax(1)).mean()), len(kl))


def _kl(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(softmax(expected) || softmax(found)) per row, float64."""
    p, q = (x.double().log_softmax(-1) for x in (expected, found))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
