"""Is the quantised model still the model? Next-token KL and top-1 agreement on held-out samples
decide. If they do not hold, the linear layers with the largest errors go back to float, as few as
suffice.

Takes a QuantPlan and a work folder whose layers are all finished, returns a Verdict: the groups of
linear layers that go back to float, and the figures. The quantised side is computed with the
engine's integer arithmetic, layer by layer.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from models.checkpoint.table import WeightTable
from models.network.decoder import norm_of
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.metrics import kl
from runtime.engine.loading.weights import load_rows
from runtime.ops.cpu.ops import CpuOps

from .integer_layer import finished_tensors, integer_layer, run_layer
from .layer_module import relative_error, release_memory
from .options import GateOptions
from .plan import QuantPlan
from .work_folder import FinishedLayer, WorkFolder, packed, select

MATRIX_ROWS = 1 << 11  # of the output matrix, multiplied at a time: buffers that malloc keeps
TOKENS = 32  # logits compared at a time, in float64

Group = tuple[int, str]  # layer, and the name in the runtime of the linear layers that become one


@dataclass
class Figures:
    """kl: mean KL(float || quantised) of the next token, in nats. top1: share of tokens whose most
    likely successor is the same. tokens: how many were judged."""

    kl: float
    top1: float
    tokens: int

    def hold(self, limits: GateOptions) -> bool:
        return self.kl <= limits.max_kl and self.top1 >= limits.min_top1


@dataclass
class Verdict:
    """float_groups: groups that go back to float, largest error first. tried: {number of such
    groups: figures}."""

    float_groups: list[Group]
    figures: Figures
    tried: dict[int, Figures]

    def report(self) -> dict:
        return {
            "kept_float": [f"layers.{index}.{group}" for index, group in self.float_groups],
            **asdict(self.figures),
            "tried": {str(count): asdict(figures) for count, figures in self.tried.items()},
        }


def pass_gate(
    plan: QuantPlan,
    folder: WorkFolder,
    limits: GateOptions,
    on_figures: Callable[[int, Figures], None],
) -> Verdict:
    """The smallest number of groups, largest error first, with which the figures hold; ToolkitError
    if none does.

    on_figures(count, figures) is called for every number that is tried.
    """
    head = Head(plan)
    ranking = Ranking(plan, folder)
    streams = folder.load_streams(plan.num_layers)
    quantised = packed(select(streams.quantised, plan.held_out))
    expected = head.logits(packed(select(streams.float_model, plan.held_out)))
    tried = {}

    def holds(count: int) -> bool:
        found = replay(plan, folder, ranking.worst(count)) if count else quantised
        tried[count] = figures(expected, head.logits(found))
        on_figures(count, tried[count])
        return tried[count].hold(limits)

    count = fewest(holds, len(ranking.quantised) - 1)  # at least one stays quantised
    if count is None:
        raise unreachable(min(tried.values(), key=lambda found: found.kl), limits)
    return Verdict(ranking.worst(count), tried[count], tried)


def unreachable(best: Figures, limits: GateOptions) -> ToolkitError:
    return ToolkitError(
        f"the quality gate cannot be reached: KL {best.kl:.3g} (limit {limits.max_kl:g}), "
        f"top-1 {best.top1:.1%} (at least {limits.min_top1:.1%}); calibrate on text like yours with "
        "--calib, try --anti m2, or set --max-kl and --min-top1 (the layers are kept for that)",
        CHECK_FAILED,
    )


def fewest(holds: Callable[[int], bool], limit: int) -> int | None:
    """Smallest count <= limit at which `holds` is true, None if there is none. It is assumed to
    stay true above that count: found by doubling, then bisecting."""
    low = -1
    high = 0
    while not holds(high):
        if high >= limit:
            return None
        low = high
        high = min(max(1, 2 * high), limit)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


class Ranking:
    """Quantised groups, ranked by the error that each alone causes in its layer; measured when
    first asked for.

    quantised: all of them, in the order of the layers.
    """

    def __init__(self, plan: QuantPlan, folder: WorkFolder):
        self._plan = plan
        self._folder = folder
        self.quantised: list[Group] = []
        for index in range(plan.num_layers):
            for group in quantised_groups(folder.layer(index)):
                self.quantised.append((index, group))

    def worst(self, count: int) -> list[Group]:
        """The `count` groups with the largest errors, largest first."""
        return self._ranked[:count] if count else []

    @functools.cached_property
    def _ranked(self) -> list[Group]:
        errors = self._errors()
        return sorted(self.quantised, key=errors.get, reverse=True)

    def _errors(self) -> dict[Group, float]:
        """{group: error of its layer with this group alone quantised}, on the held-out samples as
        the float model feeds them."""
        errors = {}
        streams = held_out_samples(self._plan)
        for index in range(self._plan.num_layers):
            groups = [group for group in self.quantised if group[0] == index]
            float_outputs = run_finished_layer(self._plan, self._folder, index, groups, streams)
            for group in groups:
                others = [other for other in groups if other != group]
                outputs = run_finished_layer(self._plan, self._folder, index, others, streams)
                errors[group] = relative_error(
                    packed(float_outputs), packed(outputs), packed(streams)
                )
            streams = float_outputs
            release_memory()
        return errors


def quantised_groups(layer: FinishedLayer) -> list[str]:
    """Groups with at least one quantised linear layer."""
    quantised = []
    for group, names in layer.groups.items():
        if any(layer.kinds[f"{name}.weight"] != "FLOAT" for name in names):
            quantised.append(group)
    return quantised


def held_out_samples(plan: QuantPlan) -> dict[int, torch.Tensor]:
    """Residual streams of the held-out samples before the first layer, by number of the sample."""
    return {number: plan.samples[number].stream for number in plan.held_out}


def replay(plan: QuantPlan, folder: WorkFolder, float_groups: list[Group]) -> torch.Tensor:
    """Residual streams of the held-out samples after the last layer, with `float_groups` in
    float."""
    streams = held_out_samples(plan)
    for index in range(plan.num_layers):
        streams = run_finished_layer(plan, folder, index, float_groups, streams)
    return packed(streams)


def run_finished_layer(
    plan: QuantPlan,
    folder: WorkFolder,
    index: int,
    float_groups: list[Group],
    streams: dict[int, torch.Tensor],
) -> dict[int, torch.Tensor]:
    """Residual streams before the layer -> after it; its groups in `float_groups` are in float."""
    tensors, kinds = finished_tensors(plan, folder, index, float_groups)
    return run_layer(plan, integer_layer(plan.family, index, tensors, kinds), streams)


class Head:
    """Final norm and output matrix of the float model, which quantisation leaves as they are."""

    def __init__(self, plan: QuantPlan):
        family = plan.family
        self.checkpoint = plan.checkpoint
        table = WeightTable(family.weights())
        rows = [row for row in table.decoder() if row.target.module == "final_norm"]
        self.norm = norm_of(
            load_rows(self.checkpoint, rows, torch.float32, "cpu", CpuOps()), "final_norm"
        )
        self.eps = family.decoder.eps
        self.layer_norm = family.decoder.norm == "layer"
        self.source = table.source_of("lm_head.weight")

    @torch.inference_mode()
    def logits(self, stream: torch.Tensor) -> np.ndarray:
        """Residual stream [tokens, hidden] after the last layer -> float32 [tokens, vocab]."""
        norm = CpuOps().layer_norm if self.layer_norm else CpuOps().rms_norm
        matrix = self.checkpoint.tensor(self.source)
        x = norm(stream, self.norm, self.eps)
        logits = np.empty((len(x), len(matrix)), np.float32)
        for start in range(0, len(matrix), MATRIX_ROWS):
            end = start + MATRIX_ROWS
            part = torch.nn.functional.linear(x, matrix[start:end].float())
            logits[:, start:end] = part.numpy()
        return logits


def figures(expected: np.ndarray, found: np.ndarray) -> Figures:
    """Figures from logits [tokens, vocab] of the float and of the quantised model; KL is infinite
    if a logit is not finite."""
    divergence = divergences(expected, found)
    tokens = len(divergence)
    if not np.isfinite(divergence).all():
        return Figures(float("inf"), 0.0, tokens)
    top1 = (expected.argmax(1) == found.argmax(1)).mean()
    return Figures(divergence.mean().item(), float(top1), tokens)


def divergences(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(expected || found) of every token, from logits [tokens, vocab] -> float64 [tokens]."""
    parts = []
    for start in range(0, len(expected), TOKENS):
        rows = slice(start, start + TOKENS)
        with np.errstate(invalid="ignore"):
            parts.append(kl(expected[rows].astype(np.float64), found[rows].astype(np.float64)))
    return np.concatenate(parts)
