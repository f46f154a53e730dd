"""Checks of the tensors of one quantised linear layer.

Takes the layer's name and kind, the checkpoint and the float type of config.json; returns findings.
"""

import math
from collections.abc import Iterator

import torch

from models.checkpoint import Checkpoint
from models.checkpoint.quantized import KINDS, STATIC, TENSORS, float_scale

from .findings import A2, P310, Finding

NEEDED = {name: set(kind.needed) for name, kind in KINDS.items()}
NEEDED["W8A8SC"] = {*NEEDED["W8A8S"], "index", "info"}
NEEDED["W8A8_MIX"] = NEEDED["W8A8"] | NEEDED["W8A16"]
FEW_SCALES = (
    0.05  # different deq_scale values per row: below, half precision has rounded them together
)


def layer_findings(
    layer: str, kind: str, checkpoint: Checkpoint, dtype: str | None
) -> Iterator[Finding]:
    """Of the quantised linear layer `layer`. dtype: of config.json, e.g. "float16"."""
    needed = sorted(NEEDED.get(kind, ()))
    missing = [tensor for tensor in needed if f"{layer}.{tensor}" not in checkpoint.shapes]
    if missing:
        yield Finding(f"{layer} ({kind}) lacks {', '.join(missing)}")
        return
    wrong = list(_wrong_dtypes(layer, needed, checkpoint))
    yield from wrong
    if wrong:
        return
    if "weight_scale" in needed:
        yield from _weight_scales(layer, kind, checkpoint)
    if kind in (*STATIC, "W8A8SC", "W8A8_MIX"):
        tensors = {tensor: checkpoint.tensor(f"{layer}.{tensor}") for tensor in needed}
        yield from _static_findings(layer, kind, tensors, dtype)


def _static_findings(
    layer: str, kind: str, tensors: dict[str, torch.Tensor], dtype: str | None
) -> Iterator[Finding]:
    """Of a layer whose activations are quantised with stored scales."""
    if kind == "W8A8SC":
        yield from _compressed(layer, tensors)
    yield from _deq_scales(layer, tensors, dtype)
    yield from _input_scale(layer, tensors)
    if kind != "W8A8SC":
        yield from _sums(layer, tensors)


def _wrong_dtypes(layer: str, needed: list[str], checkpoint: Checkpoint) -> Iterator[Finding]:
    for tensor in needed:
        if tensor not in TENSORS:
            continue
        _, allowed = TENSORS[tensor]
        dtype = checkpoint.dtype(f"{layer}.{tensor}")
        if dtype not in allowed:
            yield Finding(f"{layer}.{tensor} is {dtype}")


def _weight_scales(layer: str, kind: str, checkpoint: Checkpoint) -> Iterator[Finding]:
    scale = checkpoint.tensor(f"{layer}.weight_scale").float()
    offset = checkpoint.tensor(f"{layer}.weight_offset")
    if not _all_positive(scale):
        yield Finding(f"{layer}.weight_scale has values that are zero, negative or not finite")
    if kind == "W8A8_DYNAMIC" and offset.any():
        yield Finding(
            f"{layer}.weight_offset is not zero, and int8 products have no place for it (w_sym=True)"
        )


def _all_positive(scale: torch.Tensor) -> bool:
    return bool(torch.isfinite(scale).all() and (scale > 0).all())


def _deq_scales(layer: str, tensors: dict, dtype: str | None) -> Iterator[Finding]:
    stored = tensors["deq_scale"]
    rows = len(tensors["quant_bias"])
    scale = float_scale(stored)
    if stored.dtype == torch.int64 and dtype == "bfloat16":
        yield Finding(
            f"{layer}.deq_scale is int64 in a bfloat16 model: it would be read as numbers around 1e9"
        )
    if stored.dtype == torch.float32 and dtype == "float16":
        yield Finding(
            f"{layer}.deq_scale is float32 in a float16 model, which takes int64", (A2, P310)
        )
    count = scale.numel()
    different = scale.unique().numel()
    if count != rows:
        yield Finding(
            f"{layer}.deq_scale has {count} values for {rows} rows (made with mm_tensor=True)"
        )
    if not _all_positive(scale):
        yield Finding(
            f"{layer}.deq_scale has values that are zero, negative or not finite (float16 underflow)"
        )
    elif dtype == "float16" and count > 16 and different < FEW_SCALES * count:
        yield Finding(
            f"{layer}.deq_scale has only {different} different values (float16 rounding, "
            "if the float weights were no coarser)",
            (),
        )


def _input_scale(layer: str, tensors: dict) -> Iterator[Finding]:
    scale = tensors["input_scale"].float()
    offset = tensors["input_offset"].float()
    if scale.numel() != 1 or offset.numel() != 1 or not _all_positive(scale):
        yield Finding(f"{layer}.input_scale is not one positive number")
    elif offset != offset.round() or not -128 <= offset <= 127:
        yield Finding(
            f"{layer}.input_offset is {offset.item():g}, no whole number from -128 to 127"
        )


def _sums(layer: str, tensors: dict) -> Iterator[Finding]:
    weight = tensors["weight"]
    bias = tensors["quant_bias"].long().abs()
    if (bias >= 2**30).any():
        yield Finding(f"{layer}.quant_bias is saturated (float16 underflow of deq_scale)")
    elif len(bias) != len(weight):
        yield Finding(f"{layer}.quant_bias has {len(bias)} values for {len(weight)} rows")
    elif (_largest_sums(weight) + bias >= 2**31).any():
        yield Finding(f"{layer}: sums may overflow int32")


def _largest_sums(weight: torch.Tensor) -> torch.Tensor:
    """Per row of int8 [n, k], the largest |sum| that int8 activations can give."""
    return 128 * weight.float().abs_().sum(1).long()


def _compressed(layer: str, tensors: dict) -> Iterator[Finding]:
    """info: (tiling of k, tiling of n, k, n, 1). index: 8 bytes for every tile of 256 x 128."""
    info = tensors["info"]
    index = tensors["index"]
    if info.dtype != torch.int64 or info.numel() != 5:
        yield Finding(f"{layer}.info is no list of five int64")
        return
    k = info[2].item()
    n = info[3].item()
    num_tiles = math.ceil(k / 256) * math.ceil(n / 128)
    wanted = 8 * num_tiles
    if index.dtype != torch.int8 or index.numel() != wanted:
        yield Finding(
            f"{layer}.index has {index.numel()} values of {index.dtype}, {n} x {k} need {wanted} of int8"
        )
    if tensors["weight"].numel() > n * k or len(tensors["quant_bias"]) != n:
        yield Finding(f"{layer}: the compressed weight does not fit {n} x {k}")
