"""Quantises layer by layer; a killed run resumes after the last finished layer.

Takes a QuantPlan and a WorkFolder, returns what became of each layer; the tensors and the residual
streams after the layer are in the work folder. One layer is in memory at a time. msmodelslim's
whole-model run gives the same numbers: its statistics of a layer depend only on the samples'
residual streams before it, which are handed from layer to layer.

A layer goes one way: LayerModule -> smooth_outliers -> calibrate or keep_float -> judge_layer ->
WorkFolder.save_layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from models.checkpoint.quantized import STATIC, as_stored, float_scale
from models.network.decoder import Layer

from .integer_layer import integer_layer, run_layer
from .layer_module import LayerModule, relative_error, release_memory
from .msmodelslim_calls import quant_config, quantise_linears, set_config, suppress_outliers
from .plan import QuantPlan
from .work_folder import FinishedLayer, ResidualStreams, WorkFolder, packed, select


@dataclass
class LayerTensors:
    """A layer as the result stores it. outputs: residual streams after it, of the samples that
    calibration ran through it."""

    tensors: dict[str, torch.Tensor]
    kinds: dict[str, str]
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


def quantise_layers(plan: QuantPlan, folder: WorkFolder) -> Iterator[tuple[int, FinishedLayer]]:
    """Quantise the layers that are not finished yet; yields (index, finished layer).

    Afterwards folder.load_streams(plan.num_layers) gives the residual streams after the last layer.
    """
    first = folder.num_finished()
    release_memory()
    streams = folder.load_streams(first) if first else embedded_samples(plan)
    for index in range(first, plan.num_layers):
        finished, streams = quantise_layer(plan, folder, index, streams)
        release_memory()
        yield index, finished


def embedded_samples(plan: QuantPlan) -> ResidualStreams:
    """Residual streams before the first layer."""
    streams = {number: sample.stream for number, sample in enumerate(plan.samples)}
    return ResidualStreams(select(streams, plan.followed), streams)


@torch.inference_mode()
def quantise_layer(
    plan: QuantPlan, folder: WorkFolder, index: int, streams: ResidualStreams
) -> tuple[FinishedLayer, ResidualStreams]:
    """Residual streams before the layer -> (finished layer, residual streams after it), which are
    saved in `folder`."""
    layer = LayerModule(plan.family, plan.checkpoint, index, [s.step for s in plan.samples])
    set_config(layer, plan.dtype)
    with plan.timed("judging"):
        float_outputs = layer.float_outputs(streams.float_model)
    smoothed = smooth_outliers(plan, layer, streams.float_model, float_outputs)
    if plan.kept_float.issuperset(layer.linear_names):
        quantised = keep_float(plan, layer)
    else:
        quantised = calibrate(plan, layer, streams)
    groups = dict(layer.groups)
    del layer
    release_memory()
    with plan.timed("judging"):
        engine_layer = integer_layer(plan.family, index, quantised.tensors, quantised.kinds)
        outputs = all_outputs(plan, engine_layer, streams.quantised, quantised.outputs)
        cosine, snr = judge_layer(plan, engine_layer, streams.float_model, float_outputs)
    finished = FinishedLayer(quantised.kinds, groups, cosine, snr)
    streams_after = ResidualStreams(float_outputs, outputs)
    folder.save_layer(index, quantised.tensors, smoothed, finished, streams_after)
    return finished, streams_after


def smooth_outliers(
    plan: QuantPlan,
    layer: LayerModule,
    inputs: dict[int, torch.Tensor],
    outputs: dict[int, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Apply anti-outlier to `layer` -> its rescaled linear layers; {} if the plan has no
    anti-outlier method.

    inputs, outputs: the float model's residual streams before and after the layer.
    """
    if not plan.anti:
        return {}
    layer.streams = [inputs[number] for number in plan.calibration]
    suppress_outliers(layer, plan.anti, [outputs[number] for number in plan.calibration])
    return {name: tensor.to(plan.dtype) for name, tensor in layer.linear_tensors().items()}


def keep_float(plan: QuantPlan, layer: LayerModule) -> LayerTensors:
    """A layer of which nothing is quantised, in the result's float type."""
    tensors = {name: tensor.to(plan.dtype) for name, tensor in layer.state_dict().items()}
    return LayerTensors(tensors, dict.fromkeys(tensors, "FLOAT"))


def calibrate(plan: QuantPlan, layer: LayerModule, streams: ResidualStreams) -> LayerTensors:
    """Quantise the layer with msmodelslim, calibrated on the residual streams after the quantised
    layers before it."""
    kept_float = plan.kept_float.intersection(layer.linear_names)
    config = quant_config(plan.scheme, plan.act_method, plan.fraction, kept_float)
    float_inputs = []
    for number, stream in streams.float_model.items():
        if number in plan.calibration:
            float_inputs.append(stream)
    inputs = []
    if plan.scheme.calibrated:
        inputs = [streams.quantised[number] for number in plan.calibration]
    with plan.timed("calibrating"):
        tensors, kinds = quantise_linears(layer, config, float_inputs, inputs, plan.input_ranges)
    tensors = in_result_dtype(plan, tensors, kinds)
    for name, kind in kinds.items():
        if kind in STATIC and name.endswith(".input_scale"):
            tensors |= as_engines_round(tensors, name.removesuffix(".input_scale"), plan.dtype)
    return LayerTensors(tensors, kinds, layer.outputs)


def as_engines_round(
    tensors: dict[str, torch.Tensor], layer: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """input_scale, deq_scale and quant_bias of a static layer, made of the input_scale that engines
    see: they round it to the model's float type and take deq_scale as it is stored."""
    measured = tensors[f"{layer}.input_scale"].float()
    rounded = measured.to(dtype).float()
    if not rounded > 0:  # below the smallest number of float16
        return {}
    stored = tensors[f"{layer}.deq_scale"]
    before = float_scale(stored)
    scale = before * (rounded / measured)
    if f"{layer}.weight_scale" in tensors:
        scale = tensors[f"{layer}.weight_scale"].float().flatten() * rounded
    bias = rescaled_bias(tensors, layer, before, scale)
    return {
        f"{layer}.input_scale": rounded,
        f"{layer}.deq_scale": as_stored(scale, stored.dtype),
        f"{layer}.quant_bias": bias,
    }


def rescaled_bias(
    tensors: dict[str, torch.Tensor], layer: str, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """quant_bias int32 [n] for deq_scale `after` in place of `before`, both float32 [n]: the float
    bias in steps of deq_scale, less what the offset adds to each sum."""
    stored = tensors[f"{layer}.quant_bias"]
    offset = tensors[f"{layer}.input_offset"].double() * tensors[f"{layer}.weight"].double().sum(1)
    steps = (stored + offset) * before.double() / after.double()
    return (steps.round() - offset).to(stored.dtype)


def in_result_dtype(
    plan: QuantPlan, tensors: dict[str, torch.Tensor], kinds: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Float tensors in the result's float type, but for the biases of norms, which stay float32."""
    converted = {}
    for name, tensor in tensors.items():
        if kinds[name] == "FLOAT" and not name.endswith("norm.bias"):
            tensor = tensor.to(plan.dtype)
        converted[name] = tensor
    return converted


def all_outputs(
    plan: QuantPlan,
    layer: Layer,
    streams: dict[int, torch.Tensor],
    computed: dict[int, torch.Tensor],
) -> dict[int, torch.Tensor]:
    """Residual streams of all samples after the quantised layer; those that are in `computed` are
    taken from there."""
    missing = {number: stream for number, stream in streams.items() if number not in computed}
    outputs = computed | run_layer(plan, layer, missing)
    return select(outputs, streams)


def judge_layer(
    plan: QuantPlan,
    layer: Layer,
    inputs: dict[int, torch.Tensor],
    float_outputs: dict[int, torch.Tensor],
) -> tuple[float, float]:
    """(cosine, signal-to-noise ratio in dB) of what the quantised layer adds to the held-out
    samples' residual streams, against what the float layer adds to them. inputs: of the float
    model."""
    held_out = select(inputs, plan.held_out)
    before = packed(held_out)
    expected = packed(select(float_outputs, plan.held_out))
    found = packed(run_layer(plan, layer, held_out))
    noise = max(relative_error(expected, found, before), 1e-9)
    cosine = torch.nn.functional.cosine_similarity(
        (expected - before).flatten(), (found - before).flatten(), 0
    )
    return cosine.item(), -20 * math.log10(noise)
