"""The command behind `python -m quant`: from options to a published directory and its report."""

import hashlib
import importlib.metadata
import json
import shutil
from functools import partial
from pathlib import Path

import torch

from models import family_of
from models.checkpoint.quantized import FILE, find_description
from models.checkpoint.reader import Checkpoint
from models.checkpoint.table import WeightTable
from models.config import read_json
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import locked, write_atomically
from runtime.common.progress import byte_progress

from . import gate
from . import msmodelslim_calls as slim
from . import output as write
from .layer_loop import quantise_layers
from .layer_module import linear_groups
from .recipe import input_ranges, kept_by_group, kept_by_name, kept_by_range, recipe_for
from .sample_texts import CALIBRATION
from .samples import choose, default_lines, held_out_lines, make_samples, read_lines
from .work_folder import Job, Work, store

WORK, REPORT = ".partial", "quant_report.json"


def produce(options, calibration, recipe_options, gate_options) -> int:
    family, checkpoint = open_model(options.model)
    lines = chosen_lines(family, calibration)
    out = prepare(options.out, options.model)
    slim.open_slim()
    with locked(out):
        job, statistics = plan(family, checkpoint, options, *lines, recipe_options, out / WORK)
        check_disk(job, out)
        work = Work(out / WORK / "layers", job)
        for index, record in quantise_layers(job, work):
            print(
                f"layer {index + 1}/{job.layers}: cosine {record.cosine:.6f}, {record.snr:.1f} dB",
                flush=True,
            )
        with job.spending("judging"):
            verdict = gate.pass_gate(
                job, work, gate_options.max_kl, gate_options.min_top1, say_figures
            )
        finish(job, work, verdict, statistics, out)
    print(
        f"{out}: {job.scheme.kind}, KL {verdict.figures.kl:.3g}, top-1 {verdict.figures.top1:.1%} on "
        f"{verdict.figures.tokens} held-out tokens, {len(verdict.kept)} layer groups put back to float"
    )
    print(f"next: python -m runtime.chat --model {out}")
    return 0


def open_model(model: str):
    family = family_of(model)
    checkpoint = Checkpoint(model)
    if find_description(model):
        raise ToolkitError(
            f"--model {model} is quantised already; give the float checkpoint it was made from"
        )
    if checkpoint.format == "sat":
        raise ToolkitError(
            f"--model {model} has the SAT layout, whose names no engine reads; give the Hugging Face release"
        )
    checkpoint.check(family.weights())
    return family, checkpoint


def prepare(out: str, model: str) -> Path:
    """The output folder, made if missing; float weights must not lie in it, because engines load every *.safetensors."""
    out = Path(out).resolve()
    if out.is_file():
        raise ToolkitError(f"--out {out} is a file; give a folder")
    foreign = [
        file.name
        for file in out.glob("*")
        if file.name.endswith(write.WEIGHTS) and not file.name.startswith("quant_model")
    ]
    if foreign or out == Path(model).resolve():
        raise ToolkitError(
            f"--out {out} holds other weights ({(foreign or ['the model itself'])[0]}); give an empty folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def plan(family, checkpoint, options, lines, held, recipe_options, work: Path) -> tuple[Job, dict]:
    """Samples, and the layers that stay float from the start. lines: to calibrate on; held: to judge on."""
    recipe = recipe_for(family, options.scheme)
    samples = make_samples(family, checkpoint, lines + held)
    anti = {None: recipe.anti, "none": None}.get(recipe_options.anti, recipe_options.anti)
    act_method = recipe_options.act_method or recipe.act_method
    if options.scheme == "w8a8s" and act_method == 3:
        raise ToolkitError("--act-method 3 is not possible with --scheme w8a8s; use 1 or 2")
    job = Job(
        family,
        checkpoint,
        slim.SCHEMES[options.scheme],
        target_dtype(family, checkpoint, options.dtype),
        samples,
        len(lines),
        set(),
        anti,
        act_method,
        recipe_options.fraction,
    )
    job.keep = kept_by_group(family, recipe.keep) | kept_by_name(family, recipe_options.keep_float)
    level = wanted_level(recipe_options.disable_level, recipe.share, family)
    chosen = job.scheme.calibrated and act_method == 3  # observers are chosen by range
    statistics = measured(job, lines, work) if level or (chosen and not anti) else {}
    job.ranges = (None if anti else statistics["ranges"]) if chosen else {}
    job.keep |= kept_by_range(family, statistics.get("ranges", {}), level, job.keep)
    job.identity = identity(job, lines + held)
    return job, statistics


def chosen_lines(family, calibration) -> tuple[list, list]:
    """(lines to calibrate on, lines to judge on)"""
    lines = (
        read_lines(calibration.calib) if calibration.calib else default_lines(family, CALIBRATION)
    )
    lines, held = held_out_lines(family, lines, calibration.calib)
    return choose(lines, calibration.samples, calibration.seed), held


def wanted_level(given: str | None, share: float, family) -> int:
    if given is not None:
        return int(given[1:])
    return round(share * len(linear_groups(family)))


def measured(job: Job, lines, work: Path) -> dict:
    """Input ranges of the float model; those of an earlier run on the same samples into the same folder are taken."""
    file = work / "statistics.json"
    key = digest([str(lines), stamp(job.checkpoint)])
    for earlier in (file, work.parent / REPORT):
        if (
            earlier.is_file()
            and (stored := read_json(earlier).get("statistics", {})).get("key") == key
        ):
            return stored
    with byte_progress("measuring inputs") as update:
        ranges = input_ranges(job.family, job.checkpoint, job.samples[: job.calibrating], update)
    work.mkdir(parents=True, exist_ok=True)
    statistics = {"key": key, "ranges": ranges}
    write_atomically(file, json.dumps({"statistics": statistics}))
    return statistics


def target_dtype(family, checkpoint, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    used = WeightTable(family.weights()).used()
    stored = checkpoint.dtype(next(row.source for row in used if row.source in checkpoint.shapes))
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def identity(job: Job, lines) -> dict:
    """All that decides what the layers become."""
    return {
        "model": stamp(job.checkpoint),
        "kind": job.scheme.kind,
        "dtype": str(job.dtype),
        "anti": job.anti,
        "act_method": job.act_method,
        "fraction": job.fraction,
        "keep": sorted(job.keep),
        "lines": digest(str(lines)),
        "calibrating": job.calibrating,
        "msmodelslim": importlib.metadata.version("msmodelslim"),
    }


def stamp(checkpoint) -> list:
    """Which files these are, without reading 19 GB again."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files]


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def say_figures(count: int, found: gate.Figures):
    print(
        f"gate: {count} layer groups put back to float: KL {found.kl:.3g}, top-1 {found.top1:.1%}",
        flush=True,
    )


def check_disk(job: Job, out: Path):
    """The result, on the disk of `out`: layers are written once; anti-outlier keeps their float weights besides. Groups that
    the gate puts back to float come on top."""
    small = {f"{name}.weight" for names in linear_groups(job.family).values() for name in names} - {
        f"{name}.weight" for name in job.keep
    }
    need = sum(
        torch.Size(shape).numel() if name in small else job.checkpoint.nbytes(name)
        for name, shape in job.checkpoint.shapes.items()
    )
    need += sum(job.checkpoint.nbytes(name) for name in small) if job.anti else 0
    free = shutil.disk_usage(out).free
    print(
        f"{job.layers} layers, {sum(map(job.checkpoint.nbytes, job.checkpoint.names)) / 1e9:.1f} GB of weights; about "
        f"{need / 1e9:.1f} GB of disk for {out}, {free / 1e9:.1f} GB free",
        flush=True,
    )
    if need > free:
        raise ToolkitError(
            f"--out {out} needs about {need / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; free some "
            "space or give another folder"
        )


def finish(job: Job, work: Work, verdict: gate.Verdict, statistics: dict, out: Path):
    """Write everything into a work folder, validate it, publish it."""
    from .validate import validate

    folder = out / WORK / "result"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = entries_outside(job)
    kind = job.scheme.kind
    kinds, layers = finished_layers(job, work, verdict.kept, folder.with_name("kept"))
    with byte_progress("writing") as update:
        names = write.write_weights(entries, folder, kind, update, layers)
    kinds = {entry.name: entry.kind for entry in entries} | kinds
    texts = {
        FILE: write.write_description(kinds, kind),
        REPORT: report(job, verdict, statistics, work),
        "config.json": write.write_config(
            read_json(Path(job.checkpoint.directory) / "config.json"), kind, job.dtype
        ),
    }
    names += write.copy_small_files(Path(job.checkpoint.directory), folder)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    problems = validate(folder).problems
    if problems:
        raise ToolkitError(
            f"the result would not load: {problems[0]}; nothing was published", CHECK_FAILED
        )
    for old in set(out.glob("quant_model*")):
        old.unlink()
    write.publish(folder, out, [*names, *texts])
    shutil.rmtree(out / WORK)


def entries_outside(job: Job) -> list[write.Entry]:
    """What stands before and behind the layers, as stored but in the result's float type."""
    inside = {row.source for row in WeightTable(job.family.weights()).layers()}
    entries = []
    for name in (n for n in job.checkpoint.names if n not in inside):
        dtype = job.checkpoint.dtype(name)
        entries.append(
            write.Entry(
                name,
                job.dtype if dtype.is_floating_point else dtype,
                job.checkpoint.shapes[name],
                "FLOAT",
                partial(job.checkpoint.tensor, name),
            )
        )
    return entries


def finished_layers(job: Job, work: Work, kept, folder: Path) -> tuple[dict[str, str], list[Path]]:
    """(kinds of all tensors, a file for every layer): the work file, or one in `folder` where groups went back to float."""
    kinds = {}
    files = []
    folder.mkdir(exist_ok=True)
    for index in range(job.layers):
        if any(place[0] == index for place in kept):
            tensors, found = gate.layer_parts(job, work, index, kept)
            files.append(folder / work.weights(index).name)
            store(tensors, files[-1])
        else:
            found = work.record(index).kinds
            files.append(work.weights(index))
        kinds |= found
    return kinds, files


def report(job: Job, verdict: gate.Verdict, statistics: dict, work: Work) -> str:
    """quant_report.json: settings, every decision, every layer's figures."""
    records = [work.record(index) for index in range(job.layers)]
    layers = [{"cosine": r.cosine, "snr_db": r.snr} for r in records]
    return (
        json.dumps(
            {
                "settings": job.identity | {"model": str(job.checkpoint.directory)},
                "gate": verdict.report(),
                "kept_float_by_recipe": sorted(job.keep),
                "layers": layers,
                "seconds": job.seconds,
                "statistics": statistics,
            },
            indent=2,
        )
        + "\n"
    )
