"""The plan of a quantisation: everything that decides its result.

Takes a family with its float checkpoint, the options and the calibration lines; returns a
QuantPlan, for which the input ranges of the float model are measured where the plan depends on
them.
"""

import hashlib
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.checkpoint import Checkpoint
from models.checkpoint.table import WeightTable
from models.side_files import read_as_stored
from quant.calibration.samples import Lines, Sample, lines_key, make_samples
from runtime.common.files import own_folder, write_atomically
from runtime.common.machine import version
from runtime.common.progress import step_progress

from .msmodelslim_calls import SCHEMES, Scheme
from .options import QuantOptions, RecipeOptions
from .recipe import (
    NUM_MEASURED,
    check_fraction,
    chosen_recipe,
    input_ranges,
    kept_by_group,
    kept_by_name,
    kept_by_range,
    num_widest,
)

REPORT = "quant_report.json"


@dataclass
class QuantPlan:
    """samples: the first num_calibration are for measuring activations, the others for judging the
    result.

    dtype: float type of the result.
    kept_float: names of the linear layers that stay float from the start.
    anti: anti-outlier method, None for none.
    input_ranges: {linear layer: max |x| / standard deviation of its input}; {} where nothing
        depends on them, None where msmodelslim measures them layer by layer.
    statistics: what was measured to make the plan, {} for nothing.
    identity: everything that decides the result, as JSON values.
    seconds: {purpose: time that this run has spent on it}.
    """

    family: object
    checkpoint: Checkpoint
    scheme: Scheme
    dtype: torch.dtype
    samples: list[Sample]
    num_calibration: int
    kept_float: set[str]
    anti: str | None
    act_method: int
    fraction: float
    input_ranges: dict[str, float] | None
    statistics: dict
    identity: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, purpose: str):
        """Add the time in the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start

    @property
    def num_layers(self) -> int:
        return self.family.decoder.layers

    @property
    def calibration(self) -> range:
        """Numbers of the samples on which activations are measured."""
        return range(self.num_calibration)

    @property
    def held_out(self) -> range:
        """Numbers of the samples on which the result is judged."""
        return range(self.num_calibration, len(self.samples))

    @property
    def followed(self) -> list[int]:
        """Numbers of the samples that go through the float model too: the held-out ones, and those
        whose float inputs are needed."""
        needed = 0
        if self.anti:
            needed = self.num_calibration
        elif self.input_ranges is None:
            needed = NUM_MEASURED
        return [*self.calibration[:needed], *self.held_out]


def make_plan(
    family,
    checkpoint: Checkpoint,
    options: QuantOptions,
    recipe_options: RecipeOptions,
    lines: Lines,
    work: Path,
) -> QuantPlan:
    """Resolve the options into a plan; ToolkitError or ModelError if they do not fit the model.

    work: folder in which the measured input ranges are kept for the next run.
    """
    recipe = chosen_recipe(family, options.scheme, recipe_options)
    scheme = SCHEMES[options.scheme]
    samples = make_samples(family, checkpoint, lines.calibration + lines.held_out)
    kept_float = kept_by_group(family, recipe.float_groups)
    kept_float |= kept_by_name(family, recipe_options.keep_float)
    if scheme.settings.get("is_lowbit"):
        check_fraction(family, recipe_options.fraction, kept_float)
    count = num_widest(recipe_options.disable_level, recipe.share, family)
    observers_by_range = scheme.calibrated and recipe.act_method == 3
    statistics = {}
    if count or (observers_by_range and not recipe.anti):
        calibration_samples = samples[: len(lines.calibration)]
        statistics = measured(family, checkpoint, lines.calibration, calibration_samples, work)
    kept_float |= kept_by_range(family, statistics.get("ranges", {}), count, kept_float)
    ranges = {}
    if observers_by_range:
        ranges = None if recipe.anti else statistics["ranges"]  # anti-outlier changes the inputs
    plan = QuantPlan(
        family=family,
        checkpoint=checkpoint,
        scheme=scheme,
        dtype=target_dtype(family, checkpoint, options.dtype),
        samples=samples,
        num_calibration=len(lines.calibration),
        kept_float=kept_float,
        anti=recipe.anti,
        act_method=recipe.act_method,
        fraction=recipe_options.fraction,
        input_ranges=ranges,
        statistics=statistics,
    )
    plan.identity = identity(plan, lines)
    return plan


def measured(family, checkpoint: Checkpoint, lines: list[dict], samples, work: Path) -> dict:
    """{"key": which checkpoint and lines, "ranges": input ranges of the float model}; from an
    earlier run into the same folder if it was on the same checkpoint and lines."""
    file = work / "statistics.json"
    key = digest([lines_key(lines), stamp(checkpoint)])
    for earlier in filter(Path.is_file, (file, work.parent / REPORT)):
        stored = read_as_stored(earlier).get("statistics", {})
        if stored.get("key") == key:
            return stored
    with step_progress("measuring inputs", family.decoder.layers) as advance:
        ranges = input_ranges(family, checkpoint, samples, advance)
    own_folder(work)
    statistics = {"key": key, "ranges": ranges}
    write_atomically(file, json.dumps({"statistics": statistics}))
    return statistics


def target_dtype(family, checkpoint: Checkpoint, wanted: str) -> torch.dtype:
    """Float type of the result. wanted: --dtype; "auto" is the checkpoint's if it has 16 bits, else
    float16."""
    if wanted != "auto":
        return getattr(torch, wanted)
    used = WeightTable(family.weights()).used()
    stored = checkpoint.dtype(next(row.source for row in used if row.source in checkpoint.shapes))
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def identity(plan: QuantPlan, lines: Lines) -> dict:
    """Everything that decides what the layers become."""
    return {
        "model": stamp(plan.checkpoint),
        "kind": plan.scheme.kind,
        "dtype": str(plan.dtype),
        "anti": plan.anti,
        "act_method": plan.act_method,
        "fraction": plan.fraction,
        "keep": sorted(plan.kept_float),
        "lines": lines_key(lines.calibration + lines.held_out),
        "calibrating": plan.num_calibration,
        "msmodelslim": version("msmodelslim"),
    }


def stamp(checkpoint: Checkpoint) -> list:
    """Path, size and times of change of the files: tells checkpoints apart without reading 19 GB."""
    files = []
    for file in checkpoint.files:
        state = file.stat()
        files.append([str(file), state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    return files


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
