"""The command behind `python -m quant`.

Takes options; returns an exit code, with the quantised folder published. The stages, each of which
hands its result to the next: open_model -> choose_lines -> make_plan -> quantise_layers ->
pass_gate -> write_result.
"""

import shlex
import shutil
from pathlib import Path

import torch

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import find_description
from quant.calibration.samples import choose_lines
from quant.output.files import WEIGHTS, small_files
from quant.output.result import write_result
from runtime.common.errors import ToolkitError
from runtime.common.files import locked, work_folder

from .gate import Figures, Verdict, pass_gate
from .layer_loop import quantise_layers
from .layer_module import linear_groups
from .msmodelslim_calls import import_msmodelslim
from .options import CalibrationOptions, GateOptions, QuantOptions, RecipeOptions
from .plan import QuantPlan, make_plan
from .work_folder import PARTIAL, WorkFolder


def quantise(
    options: QuantOptions,
    calibration_options: CalibrationOptions,
    recipe_options: RecipeOptions,
    gate_options: GateOptions,
) -> int:
    family, checkpoint = open_model(options.model)
    lines = choose_lines(family, calibration_options)
    out = prepare_folder(options.out, options.model)
    import_msmodelslim()
    with locked(out):
        work_folder(out / PARTIAL)
        plan = make_plan(family, checkpoint, options, recipe_options, lines, out / PARTIAL)
        check_disk(plan, out)
        work = WorkFolder(out / PARTIAL / "layers", plan.identity)
        for index, layer in quantise_layers(plan, work):
            print(
                f"layer {index + 1}/{plan.num_layers}: cosine {layer.cosine:.6f}, {layer.snr:.1f} dB",
                flush=True,
            )
        with plan.timed("judging"):
            verdict = pass_gate(plan, work, gate_options, print_figures)
        write_result(plan, work, verdict, out, options.layout == "mindie")
    print_summary(out, plan, verdict)
    return 0


def open_model(model: str) -> tuple:
    """(family, checkpoint) of a float checkpoint; ToolkitError for a quantised one or one in the
    SAT layout."""
    family = family_of(model)
    if find_description(model):
        raise ToolkitError(
            f"--model {model} is quantised already; give the float checkpoint it was made from"
        )
    checkpoint = Checkpoint(model)
    if checkpoint.format == "sat":
        raise ToolkitError(
            f"--model {model} has the SAT layout, whose names no engine reads; give the Hugging Face release"
        )
    checkpoint.check(family.weights())
    small_files(checkpoint.directory)
    return family, checkpoint


def prepare_folder(out: str, model: str) -> Path:
    """The output folder, made if missing; ToolkitError if float weights are in it, because engines
    load every *.safetensors."""
    folder = Path(out).resolve()
    if folder.is_file():
        raise ToolkitError(f"--out {folder} is a file; give a folder")
    names = [file.name for file in folder.glob("*") if file.name.endswith(WEIGHTS)]
    foreign = [name for name in names if not name.startswith("quant_model")]
    if not foreign and folder == Path(model).resolve():
        foreign = ["the model itself"]
    if foreign:
        raise ToolkitError(
            f"--out {folder} holds other weights ({foreign[0]}); give an empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def print_figures(count: int, figures: Figures):
    print(
        f"gate: {count} layer groups put back to float: KL {figures.kl:.3g}, top-1 {figures.top1:.1%}",
        flush=True,
    )


def print_summary(out: Path, plan: QuantPlan, verdict: Verdict):
    figures = verdict.figures
    print(
        f"{out}: {plan.scheme.kind}, KL {figures.kl:.3g}, top-1 {figures.top1:.1%} on {figures.tokens} "
        f"held-out tokens, {len(verdict.float_groups)} layer groups put back to float"
    )
    print(f"next: python -m runtime.chat --model {shlex.quote(str(out))}")


def check_disk(plan: QuantPlan, out: Path):
    """Print how much disk the quantisation needs; ToolkitError if there is less."""
    checkpoint = plan.checkpoint
    weights = sum(map(checkpoint.nbytes, checkpoint.names))
    needed = bytes_needed(plan)
    free = shutil.disk_usage(out).free
    print(
        f"{plan.num_layers} layers, {weights / 1e9:.1f} GB of weights; about {needed / 1e9:.1f} GB of "
        f"disk for {out}, {free / 1e9:.1f} GB free",
        flush=True,
    )
    if needed > free:
        raise ToolkitError(
            f"--out {out} needs about {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; free some "
            "space or give another folder"
        )


def bytes_needed(plan: QuantPlan) -> int:
    """Size of the result, the layers of which are written once. With anti-outlier the float weights
    of quantised layers are kept besides. Groups that the gate puts back to float come on top and
    are not counted."""
    quantised = quantised_weights(plan)
    needed = 0
    for name, shape in plan.checkpoint.shapes.items():
        if name in quantised:
            needed += torch.Size(shape).numel()  # int8
        else:
            needed += plan.checkpoint.nbytes(name)
    if plan.anti:
        needed += sum(map(plan.checkpoint.nbytes, quantised))
    return needed


def quantised_weights(plan: QuantPlan) -> set[str]:
    """Names of the weights that become int8."""
    weights = set()
    for names in linear_groups(plan.family).values():
        weights.update(f"{name}.weight" for name in names if name not in plan.kept_float)
    return weights
