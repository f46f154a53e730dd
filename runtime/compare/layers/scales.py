"""Do the scales of a quantised folder fit its weights?

Takes a quantised folder and the reference's, returns how many int8 layers were judged, those whose
scales do not fit, and the one closest to its limit. What a layer computes with is held against its
own float weight, X.weight * X.weight_scale, and against the reference's where that is float: a
scale that is wrong by 1 % costs the logits less than rounding to 8 bits does, but rounding has no
direction, and never leaves a weight more than half a step away. Tensors are read in blocks of rows; the checkpoints' own names and order of rows.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from models.checkpoint import Checkpoint
from models.checkpoint.quantized import KINDS, STATIC, Description, find_description, float_scale

BLOCK = 512  # rows
GAIN = 0.004  # of a whole layer (measured: 0.0004 in 8 bits, 0.002 in 4)
ROW_GAIN = 0.008  # of one row against the reference's (measured: 0.005)
SIGMAS = 8  # rounding errors of a row or layer are independent: their mean falls with the root
ANOTHER = 0.4  # relative distance above which it is another weight: anti-outlier rescaled it
HALF = 0.5  # a step: what rounding to the nearest leaves
NEAREST = 0.98  # share of a layer's weights that are this near where the reference's were rounded
BIAS_STEPS = 1.0  # of quant_bias, an integer (measured: 0.5 and 0.74)
# of deq_scale where it was multiplied in this type: relative, and the smallest step
ROUNDING = {torch.float16: (2.0**-9, 2.0**-23), torch.bfloat16: (2.0**-7, 0.0)}
EXACT_ROUNDING = (1e-4, 0.0)


@dataclass
class ScaleFault:
    """What is farthest from its limit in one layer. value: 1 where it fits, of a "gain" as a
    multiple, of a "bias" or a "rounding" in steps more; `against` says what it was held against,
    row is None for the whole layer."""

    layer: str
    against: str
    value: float
    limit: float
    row: int | None = None
    measure: str = "gain"

    @property
    def excess(self) -> float:
        """Above 1 outside the limit; of a value that is no number too."""
        distance = abs(self.value - 1) / self.limit
        return distance if math.isfinite(distance) else math.inf


def judge_scales(model: str, reference: str) -> dict | None:
    """{"judged", "unjudged": names of the layers that cannot be, "failed": [fault], "worst":
    fault or None}; None for a float `model`."""
    description = find_description(model)
    if description is None:
        return None
    folder = Checkpoint(model)
    floats = Checkpoint(reference) if find_description(reference) is None else None
    judged = []
    unjudged = []
    for layer in quantised_layers(description):
        faults = list(_layer_faults(layer, description.kind(layer), folder, floats))
        scales = [fault for fault in faults if fault.measure == "gain"]
        if scales or any(fault.excess > 1 for fault in faults):
            judged.append(max(faults, key=lambda fault: fault.excess))
        else:
            unjudged.append(layer)
    return _summary(judged, unjudged)


def quantised_layers(description: Description) -> list[str]:
    """Names of the int8 linear layers."""
    layers = []
    for name in description.kinds:
        layer, _, tensor = name.rpartition(".")
        if tensor == "weight" and description.kind(layer) in KINDS:
            layers.append(layer)
    return layers


def _summary(judged: list[ScaleFault], unjudged: list[str]) -> dict:
    failed = [asdict(fault) for fault in judged if fault.excess > 1]
    worst = max(judged, key=lambda fault: fault.excess, default=None)
    return {
        "judged": len(judged),
        "unjudged": unjudged,
        "failed": failed,
        "worst": None if worst is None else asdict(worst),
    }


def _layer_faults(
    layer: str, kind: str, folder: Checkpoint, floats: Checkpoint | None
) -> Iterator[ScaleFault]:
    """One for everything the layer can be held against; none if there is nothing."""
    scale = folder_scale(layer, kind, folder)
    if kind in STATIC and f"{layer}.weight_scale" in folder.shapes:
        yield _against_own(layer, scale, folder)
    if kind in STATIC:
        yield from _bias(layer, folder)
    weight = f"{layer}.weight"
    if floats is not None and floats.shapes.get(weight) == folder.shapes[weight]:
        yield from _against_reference(layer, scale, folder, floats)


def folder_scale(layer: str, kind: str, folder: Checkpoint) -> torch.Tensor:
    """What one step of each row of the int8 weight is worth in the layer's arithmetic, float64
    [n]."""
    if kind not in STATIC:
        return folder.tensor(f"{layer}.weight_scale").double().flatten()
    products = float_scale(folder.tensor(f"{layer}.deq_scale")).double()
    return products / folder.tensor(f"{layer}.input_scale").double()


def _against_own(layer: str, scale: torch.Tensor, folder: Checkpoint) -> ScaleFault:
    """deq_scale against input_scale * weight_scale."""
    stored = folder.tensor(f"{layer}.weight_scale")
    own = stored.double().flatten()
    relative, step = ROUNDING.get(stored.dtype, EXACT_ROUNDING)
    products = own * folder.tensor(f"{layer}.input_scale").double()
    allowed = relative + step / products.abs()
    against = "its own weight_scale and input_scale"
    rows = _worst_row(layer, against, scale / own, allowed)
    gain = (scale * own).sum() / (own * own).sum()
    limit = GAIN + SIGMAS * (allowed.square().mean() / len(own)).sqrt()
    whole = ScaleFault(layer, against, gain.item(), limit.item())
    return max(whole, rows, key=lambda fault: fault.excess)


def _worst_row(layer: str, against: str, values: torch.Tensor, limits: torch.Tensor) -> ScaleFault:
    excess = ((values - 1).abs() / limits).nan_to_num(math.inf)
    row = int(excess.argmax())
    return ScaleFault(layer, against, values[row].item(), limits[row].item(), row)


def _bias(layer: str, folder: Checkpoint) -> Iterator[ScaleFault]:
    """quant_bias against the float bias and the offset that it holds."""
    sums = torch.cat([block.sum(1) for _, block in _blocks(folder, layer)])
    offset = folder.tensor(f"{layer}.input_offset").double()
    found = folder.tensor(f"{layer}.quant_bias").double() + offset * sums
    if f"{layer}.bias" not in folder.shapes:
        yield from _offset_alone(layer, found, sums)
        return
    bias = folder.tensor(f"{layer}.bias")
    steps = float_scale(folder.tensor(f"{layer}.deq_scale")).double()
    expected = bias.double() / steps
    relative, _ = ROUNDING.get(bias.dtype, EXACT_ROUNDING)
    limits = BIAS_STEPS + 2 * relative * expected.abs()
    against = "its own bias and input_offset"
    yield replace(_worst_row(layer, against, 1 + found - expected, limits), measure="bias")


def _offset_alone(layer: str, left: torch.Tensor, sums: torch.Tensor) -> Iterator[ScaleFault]:
    """quant_bias of a layer without a float bias: `left` of it is nothing in nearly every row, or in
    every row the same multiple of the row's sum; else there is a bias that is not stored."""
    wrong = (left / sums)[sums != 0].median().round()
    all_wrong = wrong != 0 and ((left - wrong * sums).abs() <= HALF).all()
    if all_wrong or (left.abs() <= HALF).double().mean() > NEAREST:
        fault = _worst_row(layer, "its own input_offset", 1 + left, torch.full_like(left, HALF))
        yield replace(fault, measure="bias")


def _against_reference(
    layer: str, scale: torch.Tensor, folder: Checkpoint, floats: Checkpoint
) -> Iterator[ScaleFault]:
    """The dequantised weight against the reference's; none if anti-outlier made another of it."""
    products = []
    for rows, block in _blocks(folder, layer):
        found = block * scale[rows, None]
        expected = floats.rows(f"{layer}.weight", rows.start, rows.stop).double()
        products.append(_products(found, expected))
    both, reference, own = torch.cat(products, 1)
    columns = folder.shapes[f"{layer}.weight"][1]
    values, errors = _gains(both, reference, own)
    gain, error = _gains(both.sum(), reference.sum(), own.sum())
    if error > ANOTHER:
        return
    against = "the reference's weight"
    limit = GAIN + SIGMAS / 2 * error.item() / math.sqrt(columns * len(both))
    yield ScaleFault(layer, against, gain.item(), limit)
    yield _worst_row(layer, against, values, ROW_GAIN + SIGMAS * errors / math.sqrt(columns))
    yield from _rounding(layer, scale, folder, floats)


def _rounding(
    layer: str, scale: torch.Tensor, folder: Checkpoint, floats: Checkpoint
) -> Iterator[ScaleFault]:
    """Every int8 weight against the reference's, in steps; none where they were not rounded to the
    nearest, or of other weights."""
    dtype = floats.dtype(f"{layer}.weight")
    if f"{layer}.weight_scale" in folder.shapes:
        stored = folder.tensor(f"{layer}.weight_scale")
        dtype = stored.dtype
        scale = stored.double().flatten()
    relative, _ = ROUNDING.get(dtype, EXACT_ROUNDING)
    distances = []
    limits = []
    near = 0
    for rows, block in _blocks(folder, layer):
        weights = floats.rows(f"{layer}.weight", rows.start, rows.stop).double()
        left = (weights / scale[rows, None] - block).abs()
        limit = HALF + relative * block.abs().amax(1)
        near += (left <= limit[:, None]).sum().item()
        distances.append(left.amax(1))
        limits.append(limit)
    if near >= NEAREST * math.prod(folder.shapes[f"{layer}.weight"]):
        worst = _worst_row(
            layer, "the reference's weight", 1 + torch.cat(distances), torch.cat(limits)
        )
        yield replace(worst, measure="rounding")


def _products(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row: found * expected, expected ** 2, found ** 2, float64 [3, rows]."""
    return torch.stack([(found * expected).sum(1), expected.square().sum(1), found.square().sum(1)])


def _gains(both, reference, own) -> tuple[torch.Tensor, torch.Tensor]:
    """(gain, error beside it relative to the reference); 1 and 0 where both are zero."""
    empty = (reference == 0) & (own == 0)
    gain = torch.where(empty, 1.0, both / reference)
    error = (own - 2 * gain * both + gain**2 * reference).clamp(min=0) / reference
    return gain, torch.where(empty, 0.0, error.sqrt())


def _blocks(folder: Checkpoint, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, those rows of the int8 weight as float64), BLOCK at a time."""
    rows = folder.shapes[f"{layer}.weight"][0]
    for start in range(0, rows, BLOCK):
        block = slice(start, min(start + BLOCK, rows))
        yield block, folder.rows(f"{layer}.weight", block.start, block.stop).double()
