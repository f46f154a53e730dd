"""Writes, validates and publishes the quantised folder.

Takes a QuantPlan, its finished work folder and the gate's Verdict; returns nothing: the folder
`out` then holds what engines load, and quant_report.json.
"""

import json
from functools import partial
from pathlib import Path

from models.checkpoint.quantized import FILE, halves_of
from models.checkpoint.shards import TensorReader, stored_entries
from models.checkpoint.table import WeightTable
from models.side_files import read_as_stored
from quant.gate import Group, Verdict
from quant.integer_layer import finished_tensors
from quant.plan import REPORT, QuantPlan
from quant.validate.folder import validate
from quant.work_folder import PARTIAL, WorkFolder, store
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import (
    CHECKSUMS,
    fresh_folder,
    own_folder,
    remove_folder,
    write_atomically,
    write_checksums,
)
from runtime.common.progress import byte_progress

from .files import checked, copy_small_files, publish, write_config, write_description
from .weights import Entry, write_weights


def write_result(plan: QuantPlan, work: WorkFolder, verdict: Verdict, out: Path, one_file: bool):
    """Write everything into a folder inside `out`, validate and publish it, then remove the work
    folder; ToolkitError if it would not load. one_file: under the names of MindIE's guide."""
    folder = fresh_folder(out / PARTIAL / "result")
    names = write_files(plan, work, verdict, folder, one_file)
    problems = validate(folder).problems
    if problems:
        raise ToolkitError(
            f"the result would not load: {problems[0]}; nothing was published", CHECK_FAILED
        )
    write_checksums(folder, checked(names))
    for old in set(out.glob("quant_model*")):
        old.unlink()
    publish(folder, out, [CHECKSUMS, *names])
    remove_folder(out / PARTIAL)


def write_files(
    plan: QuantPlan, work: WorkFolder, verdict: Verdict, folder: Path, one_file: bool
) -> list[str]:
    """The files of the result in `folder` -> their names, the description last."""
    source = Path(plan.checkpoint.directory)
    kind = plan.scheme.kind
    entries = entries_outside(plan)
    kinds = {entry.name: entry.kind for entry in entries}
    kinds_in_layers, layers = layer_files(
        plan, work, verdict.float_groups, folder.with_name("kept")
    )
    kinds |= kinds_in_layers
    description = FILE
    if one_file:
        description = f"quant_model_description_{kind.lower()}.json"
        entries += layer_entries(layers, kinds)
        layers = []
    with byte_progress("writing") as update:
        names = write_weights(entries, folder, kind, update, layers, one_file)
    texts = {
        REPORT: report(plan, work, verdict),
        "config.json": write_config(read_as_stored(source / "config.json"), kind, plan.dtype),
        description: write_description(kinds | halves_of(kinds), kind),
    }
    names += copy_small_files(source, folder)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [*names, *texts]


def entries_outside(plan: QuantPlan) -> list[Entry]:
    """The tensors outside the layers, as stored but in the result's float type."""
    inside = {row.source for row in WeightTable(plan.family.weights()).layers()}
    entries = []
    for name in plan.checkpoint.names:
        if name in inside:
            continue
        dtype = plan.checkpoint.dtype(name)
        if dtype.is_floating_point:
            dtype = plan.dtype
        read = partial(plan.checkpoint.tensor, name)
        entries.append(Entry(name, dtype, plan.checkpoint.shapes[name], "FLOAT", read))
    return entries


def layer_entries(files: list[Path], kinds: dict[str, str]) -> list[Entry]:
    """The tensors of finished layers' files, to be written into another."""
    entries = []
    reader = TensorReader()
    for file in files:
        for name, stored in stored_entries(file).items():
            read = partial(reader.tensor, name, stored)
            entries.append(Entry(name, stored.dtype, stored.shape, kinds[name], read))
    return entries


def layer_files(
    plan: QuantPlan, work: WorkFolder, float_groups: list[Group], folder: Path
) -> tuple[dict[str, str], list[Path]]:
    """(kinds of the tensors in all layers, a file for every layer): the work folder's file, or one
    written into `folder` where groups went back to float."""
    kinds = {}
    files = []
    changed = {index for index, _ in float_groups}
    own_folder(folder)
    for index in range(plan.num_layers):
        if index in changed:
            files.append(folder / work.weights(index).name)
            kinds |= store_layer(plan, work, index, float_groups, files[-1])
        else:
            files.append(work.weights(index))
            kinds |= work.layer(index).kinds
    return kinds, files


def store_layer(
    plan: QuantPlan, work: WorkFolder, index: int, float_groups: list[Group], file: Path
) -> dict[str, str]:
    """Write the layer with its groups in `float_groups` in float -> kinds of its tensors."""
    tensors, kinds = finished_tensors(plan, work, index, float_groups)
    store(tensors, file)
    return kinds


def report(plan: QuantPlan, work: WorkFolder, verdict: Verdict) -> str:
    """quant_report.json: settings, every decision, every layer's figures."""
    layers = []
    for index in range(plan.num_layers):
        layer = work.layer(index)
        layers.append({"cosine": layer.cosine, "snr_db": layer.snr})
    content = {
        "settings": plan.identity | {"model": str(plan.checkpoint.directory)},
        "gate": verdict.report(),
        "kept_float_by_recipe": sorted(plan.kept_float),
        "layers": layers,
        "seconds": plan.seconds,
        "statistics": plan.statistics,
    }
    return json.dumps(content, indent=2) + "\n"
