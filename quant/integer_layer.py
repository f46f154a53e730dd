"""A finished layer, computed as the engine computes it: integer arithmetic where it is quantised,
float32 elsewhere.

Takes the tensors of a finished layer (`finished_tensors`, some of its groups put back to float if
asked), returns the layer (`integer_layer`) and, from residual streams before it, those after it
(`run_layer`).
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from models.checkpoint import Checkpoint
from models.checkpoint.quantized import Description, quantized_weights
from models.checkpoint.shards import Entry
from models.checkpoint.table import WeightTable
from models.checkpoint.tensor_files import load_tensors
from models.network.decoder import Layer, LayerArithmetic, layer_of
from runtime.engine.loading.weights import load_rows

from .layer_module import NO_CACHE, LayerOps
from .plan import QuantPlan
from .work_folder import WorkFolder


class MemoryCheckpoint(Checkpoint):
    """Tensors in memory, read like a checkpoint's."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors
        self._entries = {
            name: Entry(Path(), t.dtype, tuple(t.shape)) for name, t in tensors.items()
        }

    def tensor(self, name):
        return self._tensors[name]


def integer_layer(family, index: int, tensors: dict, kinds: dict) -> Layer:
    """The layer as the runtime computes it, float parts in float32."""
    rows = WeightTable(family.weights()).layer(index)
    table = WeightTable(quantized_weights(rows, Description(Path("layer"), "", kinds)))
    checkpoint = MemoryCheckpoint(tensors)
    weights = load_rows(checkpoint, table.used(), torch.float32, "cpu", LayerOps())
    return layer_of(weights, f"layers.{index}.")


@torch.inference_mode()
def run_layer(
    plan: QuantPlan, layer: Layer, streams: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Residual streams {number of a sample: [T, hidden]} before the layer -> after it."""
    arithmetic = LayerArithmetic(plan.family.decoder, LayerOps())
    return {
        number: arithmetic.layer(stream, layer, 0, plan.samples[number].step, NO_CACHE)
        for number, stream in streams.items()
    }


def finished_tensors(
    plan: QuantPlan, folder: WorkFolder, index: int, float_groups: Iterable[tuple[int, str]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, kinds) of a finished layer, by name; its groups in `float_groups` (layer, group)
    are put back to float."""
    finished = folder.layer(index)
    back_to_float = set()
    for layer, group in float_groups:
        if layer == index:
            back_to_float.update(finished.groups[group])
    tensors = {}
    kinds = {}
    for name, tensor in load_tensors(folder.weights(index)).items():
        if name.rpartition(".")[0] not in back_to_float:
            tensors[name] = tensor
            kinds[name] = finished.kinds[name]
    floats = float_tensors(plan, folder, index, back_to_float)
    return tensors | floats, kinds | dict.fromkeys(floats, "FLOAT")


def float_tensors(
    plan: QuantPlan, folder: WorkFolder, index: int, linear_names: set[str]
) -> dict[str, torch.Tensor]:
    """Weights and biases of the linear layers as they were before quantisation, rescaled if
    anti-outlier did so."""
    smoothed = {}
    if linear_names and folder.smoothed(index).is_file():
        smoothed = load_tensors(folder.smoothed(index))
    tensors = {}
    for linear in sorted(linear_names):
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in plan.checkpoint.shapes and name in smoothed:
                tensors[name] = smoothed[name]
            elif name in plan.checkpoint.shapes:
                tensors[name] = plan.checkpoint.tensor(name).to(plan.dtype)
    return tensors
