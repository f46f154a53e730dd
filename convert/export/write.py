"""Writing an export. Takes a traced graph and a checkpoint, writes vision.onnx + vision.onnx.data.

One tensor is in memory at a time: the graph is traced without weights, and each weight becomes a
reference into the data file when it is written.
"""

import shutil
from pathlib import Path

import onnx_ir as ir
import torch

from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.allocator import keep_freed_memory
from runtime.common.errors import ToolkitError
from runtime.common.files import file_entry
from runtime.common.progress import byte_progress
from runtime.vision.artifact import DATA, ONNX

from .data_file import ALIGNMENT, DataFile

GRAPH_BYTES = 8 << 20  # generous: graph, manifest, atc.sh
KEPT_BYTES = 64 << 20


def bytes_needed(family: Family) -> int:
    """Size on disk of the exported encoder, at most."""
    with torch.device("meta"):
        parameters = list(family.vision_encoder().parameters())
    return sum(4 * p.numel() + ALIGNMENT for p in parameters) + GRAPH_BYTES


def check_space(family: Family, artifact_dir: Path) -> str:
    """A line about what will be written; ToolkitError if the disk has no room for it."""
    needed = bytes_needed(family)
    free = shutil.disk_usage(artifact_dir).free
    if needed > free:
        raise ToolkitError(
            f"the exported encoder needs {_size(needed)} in {artifact_dir}, only {_size(free)} are free; "
            "free some space or choose another --out"
        )
    return f"writing {_size(needed)} to {artifact_dir} ({_size(free)} free)"


def write_onnx(model: ir.Model, family: Family, checkpoint: Checkpoint, onnx_dir: Path) -> dict:
    """Write the traced `model` and its weights, in fp32; {file name: {bytes, sha256}}.

    ToolkitError if the family's table does not fill its tower exactly.
    """
    torch.set_num_threads(1)  # the other core hashes and writes
    own = len(family.vision.inputs)
    slots = {value.name: value for value in model.graph.inputs[own:]}
    weights = family.weights()
    with DataFile(onnx_dir / DATA) as data, byte_progress("exporting vision weights") as update:
        for target, tensor in checkpoint.assemble(weights, "vision.", torch.float32, update):
            name = target.removeprefix("vision.")
            _fill(slots.pop(name, None), name, tensor, data)
            del tensor  # or it would stay while the next one is built
    if slots:
        raise ToolkitError(
            f"{family.name}'s weight table leaves {len(slots)} tower weights empty, e.g. {min(slots)}"
        )
    register_weights(model.graph, own)
    ir.save(model, onnx_dir / ONNX)
    return {
        ONNX: file_entry(onnx_dir / ONNX),
        DATA: {"bytes": data.size, "sha256": data.sha256},
    }


def reuse_memory():
    """Make malloc keep the memory of freed tensors (up to KEPT_BYTES each) for the next ones: fresh
    pages from the system cost more than the copies into them, above all in virtual machines.
    """
    keep_freed_memory(KEPT_BYTES, 2 * KEPT_BYTES)


def _fill(slot: ir.Value | None, name: str, tensor: torch.Tensor, data: DataFile):
    if slot is None or tuple(slot.shape) != tuple(tensor.shape):
        expected = "no such weight" if slot is None else list(slot.shape)
        raise ToolkitError(
            f"vision weight {name} {list(tensor.shape)} does not fit the tower, which has {expected}"
        )
    slot.const_value = data.write(name, tensor)


def register_weights(graph: ir.Graph, own: int):
    """Turn the weights, which stand behind the tower's `own` inputs, into initializers."""
    weights = graph.inputs[own:]
    graph.inputs[:] = graph.inputs[:own]
    for value in weights:
        graph.register_initializer(value)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
