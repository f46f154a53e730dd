"""A checkpoint's vision weights in, vision.onnx + vision.onnx.data out, streamed: one tensor in memory at a time.

The graph is traced without weights; each weight becomes a reference into the data file when it is written.
"""
import hashlib
import shutil
from pathlib import Path

import onnx_ir as ir
import torch

from models.base import Family
from models.checkpoint import Checkpoint
from runtime.artifact import DATA, ONNX
from runtime.errors import ToolkitError
from runtime.progress import byte_progress, spinner

ALIGNMENT = 4096            # a page: the data can be mapped
GRAPH_BYTES = 8 << 20       # generous: graph, manifest, atc.sh


class DataFile:
    """The one external data file: `write` appends a tensor and returns the reference to it."""

    def __init__(self, path: Path):
        self.path, self.hash, self.size = path, hashlib.sha256(), 0

    def __enter__(self):
        self.stream = open(self.path, "wb")
        return self

    def __exit__(self, *error):
        self.stream.close()

    def write(self, name: str, tensor: torch.Tensor) -> ir.ExternalTensor:
        self._append(bytes(-self.size % ALIGNMENT))
        offset, array = self.size, tensor.contiguous().numpy()
        self._append(memoryview(array).cast("B"))
        return ir.ExternalTensor(self.path.name, offset, array.nbytes, ir.DataType.FLOAT, name=name,
                                 shape=ir.Shape(array.shape), base_dir=self.path.parent)

    def _append(self, data):
        self.stream.write(data)
        self.hash.update(data)
        self.size += len(data)


def bytes_needed(family: Family) -> int:
    """Size on disk of the exported encoder, at most."""
    with torch.device("meta"):
        parameters = list(family.vision_encoder().parameters())
    return sum(4 * p.numel() + ALIGNMENT for p in parameters) + GRAPH_BYTES


def check_space(family: Family, folder: Path) -> str:
    """Says what will be written; ToolkitError if it does not fit on the disk."""
    need, free = bytes_needed(family), shutil.disk_usage(folder).free
    if need > free:
        raise ToolkitError(f"the exported encoder needs {_size(need)} in {folder}, only {_size(free)} are free; "
                           "free some space or choose another --out")
    return f"writing {_size(need)} to {folder} ({_size(free)} free)"


def export(family: Family, checkpoint: Checkpoint, folder: Path) -> dict:
    """Write vision.onnx and vision.onnx.data into `folder`; {file name: {bytes, sha256}}.

    fp32 weights under the names of the tower's parameters. ToolkitError if the family's table does not fill its tower.
    """
    from .trace import trace
    with spinner("tracing the vision encoder"):
        model = trace(family.vision_encoder, family.vision)
    slots = {value.name: value for value in model.graph.inputs[1:]}
    with DataFile(folder / DATA) as data, byte_progress("exporting vision weights") as update:
        for target, tensor in checkpoint.assemble(family.weights(), "vision.", torch.float32, update):
            name = target.removeprefix("vision.")
            _fill(slots.pop(name, None), name, tensor, data)
    if slots:
        raise ToolkitError(f"{family.name}'s weight table leaves {len(slots)} tower weights empty, e.g. {min(slots)}")
    _register(model.graph)
    ir.save(model, folder / ONNX)
    return {ONNX: _entry((folder / ONNX).read_bytes()), DATA: {"bytes": data.size, "sha256": data.hash.hexdigest()}}


def _fill(slot: ir.Value | None, name: str, tensor: torch.Tensor, data: DataFile):
    if slot is None or tuple(slot.shape) != tuple(tensor.shape):
        expected = "no such weight" if slot is None else list(slot.shape)
        raise ToolkitError(f"vision weight {name} {list(tensor.shape)} does not fit the tower, which has {expected}")
    slot.const_value = data.write(name, tensor)


def _register(graph: ir.Graph):
    """Weights were graph inputs without data; now they are initializers."""
    picture, *weights = graph.inputs
    graph.inputs[:] = [picture]
    for value in weights:
        graph.register_initializer(value)


def _entry(content: bytes) -> dict:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
