"""Reads the decoder's weights: takes a checkpoint, returns tensors in the form that the operators
want.

One tensor at a time is read and packed, so that memory never holds much more than the result.
"""

from collections import Counter, defaultdict
from fnmatch import fnmatchcase

import torch

from models.checkpoint.quantized import float_scale, layer_of, stored_weights
from models.checkpoint.table import Weight, WeightTable
from models.network.decoder import linear_of
from models.network.linear import Linear, Stacked, as_float32
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.progress import byte_progress

MATRICES = ("qkv.weight", "out.weight", "up.weight", "down.weight", "lm_head.weight")
SCALES = ("input_scale", "weight_scale", "deq_scale")
LARGEST_OFFSET = 128  # of int8
BRANCH = {"qkv": "attention", "out": "attention", "up": "mlp", "down": "mlp"}


def decoder_rows(family, split) -> list[Weight]:
    """The weight table of the decoder, or of the part of it that `split` gives to this device."""
    return WeightTable(split.weights(stored_weights(family))).decoder()


def decoder_weights(
    checkpoint, family, dtype: torch.dtype, device: str, ops, split, keep=()
) -> dict:
    """Canonical name -> tensor of `dtype` on `device`, the part that `split` gives to it; matrices
    packed by `ops` as soon as they are complete.

    Quantised layers stand under the layer's name, their int8 tensors as stored, packed by `ops`
    too. keep: the stages (patterns of names as "layers.0.mlp") whose linear layers stay float32;
    each stands under its name as a Float32Linear.
    """
    rows = decoder_rows(family, split)
    wide = kept_rows(rows, keep) if dtype != torch.float32 else []
    weights = load_rows(checkpoint, [row for row in rows if row not in wide], dtype, device, ops)
    if wide:
        floats = load_rows(checkpoint, wide, torch.float32, device, ops)
        for name in dict.fromkeys(target.rpartition(".")[0] for target in floats):
            weights[name] = as_float32(name.rpartition(".")[2], linear_of(floats, name), dtype)
    return without_zero_biases(weights, family)


def without_zero_biases(weights: dict, family) -> dict:
    """Anti-outlier methods write a bias to every RMSNorm, most of them zero."""
    if family.decoder.norm != "rms":
        return weights
    return {name: w for name, w in weights.items() if not name.endswith("norm.bias") or w.any()}


def kept_rows(rows: list[Weight], patterns) -> list[Weight]:
    """The rows of float linear layers in stages whose names match; ToolkitError for a pattern that
    matches none."""
    stages = float_stages(rows)
    for pattern in patterns:
        if not any(fnmatchcase(stage, pattern) for stage in stages):
            known = "the checkpoint is quantised"
            if stages:
                known = f"they are {next(iter(stages))} to {list(stages)[-1]}"
            raise ToolkitError(f"--keep-dtype {pattern} names no stage with float weights; {known}")
    kept = []
    for stage, its_rows in stages.items():
        if any(fnmatchcase(stage, pattern) for pattern in patterns):
            kept += its_rows
    return kept


def float_stages(rows: list[Weight]) -> dict[str, list[Weight]]:
    """Stage, as "layers.0.mlp", -> the rows of its linear layers that are not quantised."""
    stages = {}
    for row in rows:
        target = row.target
        if target.layer is not None and target.role in BRANCH and not target.is_piece:
            stage = f"layers.{target.layer}.{BRANCH[target.role]}"
            stages.setdefault(stage, []).append(row)
    return stages


def load_rows(checkpoint, rows: list[Weight], dtype: torch.dtype, device: str, ops) -> dict:
    """The targets of table rows, as in `decoder_weights`."""
    with byte_progress("loading weights") as update:
        return read_rows(checkpoint, rows, dtype, device, ops, update)


def read_rows(checkpoint, rows: list[Weight], dtype: torch.dtype, device: str, ops, update) -> dict:
    """load_rows; calls update(done, total) with bytes."""
    plain = [row for row in rows if not row.target.is_piece]
    pieces = [row for row in rows if row.target.is_piece]
    plain_bytes = stored_bytes(checkpoint, plain)
    total = plain_bytes + stored_bytes(checkpoint, pieces)

    def plain_progress(done, _):
        update(done, total)

    def piece_progress(done, _):
        update(plain_bytes + done, total)

    weights = {}
    for name, tensor in checkpoint.assemble(plain, dtype=dtype, progress=plain_progress):
        tensor = tensor.to(device)
        weights[name] = ops.pack(tensor) if name.endswith(MATRICES) else tensor
    tensors = checkpoint.assemble(pieces, progress=piece_progress)
    for name, layer in _layers(tensors, pieces, dtype):
        weights[name] = _packed(layer, dtype, device, ops)
    return weights


def sources_of(rows: list[Weight]) -> dict[str, str]:
    """{target: names of the tensors in the checkpoint that it is made of}."""
    sources = {}
    for row in rows:
        for part in row.parts:
            name = str(part.target)
            sources[name] = f"{sources[name]}, {row.source}" if name in sources else row.source
    return sources


def check_finite(name: str, tensor: torch.Tensor):
    """ToolkitError for NaN or Inf in a tensor that is rounded to whole numbers, or scales them:
    what is computed with them would not show it."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ToolkitError(
            f"{name} in the checkpoint holds NaN or Inf; download its files again, or look at the run that "
            "wrote them",
            CHECK_FAILED,
        )


def check_quantised(name: str, kind: str, tensor: torch.Tensor):
    """ToolkitError for a tensor `kind` ("weight_scale", ...) of a quantised layer with values that
    no quantisation gives: damage, of which the result would show nothing."""
    if kind == "deq_scale":  # whose bits may be stored as a whole number
        tensor = float_scale(tensor)
    check_finite(name, tensor)
    if kind in SCALES and not (tensor > 0).all():
        raise ToolkitError(
            f"{name} in the checkpoint has scales that are zero or negative, which no quantisation gives; "
            "download its files again, or look at `python -m quant validate`",
            CHECK_FAILED,
        )
    if kind == "input_offset" and not (tensor.abs() <= LARGEST_OFFSET).all():
        raise ToolkitError(
            f"{name} in the checkpoint is {tensor.float().max():g}, and a zero point lies from -128 to 127; "
            "download its files again, or look at `python -m quant validate`",
            CHECK_FAILED,
        )


def stored_bytes(checkpoint, rows: list[Weight]) -> int:
    """Bytes of the rows' sources; optional ones may be missing."""
    return sum(checkpoint.nbytes(row.source) for row in rows if row.source in checkpoint.shapes)


def _layers(tensors, rows, dtype):
    """(name, layer) of every layer whose pieces have all been read."""
    targets = {str(part.target): part.target for row in rows for part in row.parts}
    sources = sources_of(rows)
    missing = Counter(target.module for target in targets.values())
    read = defaultdict(dict)
    for name, tensor in tensors:
        target = targets[name]
        _, piece = read[target.module].setdefault(target.first_row, (target.kind, {}))
        check_quantised(sources[name], target.tensor, tensor)
        piece[target.tensor] = tensor
        missing[target.module] -= 1
        if not missing[target.module]:
            yield target.module, layer_of(read.pop(target.module), dtype)


def _packed(layer, dtype, device, ops):
    if isinstance(layer, Stacked):
        return Stacked([_packed(part, dtype, device, ops) for part in layer.parts])
    if isinstance(layer, Linear):
        bias = None if layer.bias is None else layer.bias.to(device)
        return Linear(ops.pack(layer.weight.to(device)), bias)
    return ops.pack_quantized(layer.to(device), dtype)
