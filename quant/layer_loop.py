"""Layer by layer: calibrate, quantise, measure, keep; a killed run goes on behind the last finished layer.

A Job flows in; a work folder with one file per layer flows out, and what the float and the quantised model make of the
held-out samples. At any time one layer is in memory. msmodelslim's whole-model run gives the same numbers: its statistics
of a layer depend on the samples' residual streams in front of it, and those are handed from layer to layer.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.checkpoint.quantized import Description, quantized_weights
from models.checkpoint.reader import Checkpoint
from models.checkpoint.shards import Entry
from models.checkpoint.table import WeightTable
from models.network.decoder import LayerArithmetic, layer_of
from runtime.engine.loading.weights import load_rows

from . import msmodelslim_calls as slim
from .layer_module import NO_CACHE, LayerModule, LayerOps, release_memory
from .work_folder import Job, Record, Streams, Work


class MemoryCheckpoint(Checkpoint):
    """Tensors at hand, read like a checkpoint's."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors
        self._entries = {
            name: Entry(Path(), t.dtype, tuple(t.shape)) for name, t in tensors.items()
        }

    def tensor(self, name):
        return self._tensors[name]


def quantise_layers(job: Job, work: Work) -> Iterator[tuple[int, Record]]:
    """Every layer that is not finished yet; afterwards work.load_streams(job.layers) is behind the last."""
    start = work.finished()
    release_memory()
    streams = (
        work.load_streams(start)
        if start
        else {
            "float": {i: job.samples[i].stream for i in job.followed},
            "quantised": {i: s.stream for i, s in enumerate(job.samples)},
        }
    )
    for index in range(start, job.layers):
        record, streams = _one_layer(job, work, index, streams)
        release_memory()
        yield index, record


@torch.inference_mode()
def _one_layer(job: Job, work: Work, index: int, streams: Streams) -> tuple[Record, Streams]:
    n = job.calibrating
    steps = [sample.step for sample in job.samples]
    layer = LayerModule(job.family, job.checkpoint, index, steps)
    slim.configure(layer, job.dtype)
    with job.spending("judging"):
        after = layer.float_outputs(streams["float"])
    floats = {}
    if job.anti:
        layer.stream = [streams["float"][i] for i in range(n)]
        slim.suppress_outliers(layer, job.anti, [after[i] for i in range(n)])
        floats = {name: tensor.to(job.dtype) for name, tensor in _linear_tensors(layer).items()}
    keep = job.keep & set(layer.linear_names)
    groups = dict(layer.groups)
    names = set(layer.linear_names)
    if keep == names:
        tensors = {name: t.to(job.dtype) for name, t in layer.state_dict().items()}
        kinds = dict.fromkeys(tensors, "FLOAT")
        outputs = {}
    else:
        float_stream = [x for i, x in streams["float"].items() if i < n]
        with job.spending("calibrating"):
            tensors, kinds = slim.quantise(
                layer,
                job.scheme,
                keep,
                float_stream,
                [streams["quantised"][i] for i in range(n)],
                job.act_method,
                job.fraction,
                job.ranges,
            )
        tensors = {
            name: t.to(job.dtype)
            if kinds[name] == "FLOAT" and not name.endswith("norm.bias")
            else t
            for name, t in tensors.items()
        }
        outputs = layer.outputs
    del layer
    release_memory()
    with job.spending("judging"):
        quantised = integer_layer(job.family, index, tensors, kinds)
        behind = {
            "float": after,
            "quantised": {
                i: outputs[i] if i in outputs else run(job, quantised, x, i)
                for i, x in streams["quantised"].items()
            },
        }
        record = Record(kinds, groups, *_measure(job, quantised, streams["float"], after))
    work.keep(index, tensors, floats, record, behind)
    return record, behind


def _linear_tensors(layer: LayerModule) -> dict[str, torch.Tensor]:
    state = layer.state_dict()
    return {
        f"{name}.{end}": state[f"{name}.{end}"]
        for name in layer.linear_names
        for end in ("weight", "bias")
        if f"{name}.{end}" in state
    }


def integer_layer(family, index: int, tensors: dict, kinds: dict):
    """The layer as the runtime computes it, float parts in float32."""
    rows = WeightTable(family.weights()).layer(index)
    table = WeightTable(quantized_weights(rows, Description(Path("layer"), "", kinds)))
    checkpoint = MemoryCheckpoint(tensors)
    weights = load_rows(checkpoint, table.used(), torch.float32, "cpu", LayerOps())
    return layer_of(weights, f"layers.{index}.")


@torch.inference_mode()
def run(job: Job, layer, x, number: int):
    """Residual stream of sample `number` before the layer -> behind it."""
    return LayerArithmetic(job.family.decoder, LayerOps()).layer(
        x, layer, 0, job.samples[number].step, NO_CACHE
    )


def with_floats(
    job: Job, work: Work, index: int, tensors: dict, kinds: dict, names: set[str]
) -> tuple[dict, dict]:
    """(tensors, kinds) of a layer with the linear layers `names` as they were before quantisation."""
    floats = load_file(work.floats(index)) if names and work.floats(index).is_file() else {}
    kept = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in names}
    for name in names:
        for tensor in (f"{name}.weight", f"{name}.bias"):
            if tensor in job.checkpoint.shapes:
                kept[tensor] = (
                    floats[tensor]
                    if tensor in floats
                    else job.checkpoint.tensor(tensor).to(job.dtype)
                )
    return kept, {
        name: "FLOAT" if name.rpartition(".")[0] in names else kinds[name] for name in kept
    }


def _measure(job: Job, quantised, stream, after) -> tuple[float, float]:
    """(cosine, signal-to-noise ratio in dB) on the held-out samples."""
    held = range(job.calibrating, len(job.samples))
    expected, before = (torch.cat([s[i] for i in held]) for s in (after, stream))
    found = torch.cat([run(job, quantised, stream[i], i) for i in held])
    noise = max(relative_error(expected, found, before), 1e-9)
    cosine = torch.nn.functional.cosine_similarity(
        (expected - before).flatten(), (found - before).flatten(), 0
    )
    return cosine.item(), -20 * math.log10(noise)


def relative_error(expected, found, before) -> float:
    """Of what the layer adds to the residual stream."""
    return ((found - expected).norm() / (expected - before).norm().clamp(min=1e-30)).item()
