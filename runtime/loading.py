"""Reads the decoder's weights from the checkpoint straight into the backend's form, one tensor at a time."""
from collections import Counter, defaultdict

import torch

from models.base import Weight
from models.layers import Linear
from models.quantized import PIECE, Stacked, layer_of, stored_weights

from .progress import byte_progress

MATRICES = ("qkv.weight", "out.weight", "up.weight", "down.weight", "lm_head.weight")


def decoder_rows(family, split) -> list[Weight]:
    """The weight table of the decoder, or of the part of it that `split` gives to this device."""
    return [w for w in split.weights(stored_weights(family)) if w.parts and not w.parts[0].target.startswith("vision.")]


def decoder_weights(checkpoint, family, dtype: torch.dtype, device: str, ops, split) -> dict:
    """Canonical name -> tensor of `dtype` on `device`, the part that `split` gives to it; matrices packed by `ops` as soon
    as they are complete.

    Quantised layers stand under the layer's name, their int8 tensors as stored, packed by `ops` too.
    """
    weights = load_rows(checkpoint, decoder_rows(family, split), dtype, device, ops)
    if family.decoder.norm == "rms":        # anti-outlier methods write biases, most of them zero
        weights = {name: w for name, w in weights.items() if not name.endswith("norm.bias") or w.any()}
    return weights


def load_rows(checkpoint, rows: list[Weight], dtype: torch.dtype, device: str, ops) -> dict:
    """The targets of table rows, as in `decoder_weights`."""
    plain = [row for row in rows if not PIECE.fullmatch(row.parts[0].target)]
    pieces = [row for row in rows if PIECE.fullmatch(row.parts[0].target)]
    total = sum(checkpoint.nbytes(row.source) for row in rows if row.source in checkpoint.shapes)
    with byte_progress("loading weights") as update:
        weights = {name: ops.pack(tensor.to(device)) if name.endswith(MATRICES) else tensor.to(device)
                   for name, tensor in checkpoint.assemble(plain, dtype=dtype, progress=lambda done, _: update(done, total))}
        before = sum(checkpoint.nbytes(row.source) for row in plain if row.source in checkpoint.shapes)
        tensors = checkpoint.assemble(pieces, progress=lambda done, _: update(before + done, total))
        for name, layer in _layers(tensors, pieces, dtype):
            weights[name] = _packed(layer, dtype, device, ops)
    return weights


def _layers(tensors, rows, dtype):
    """(name, layer) of every layer whose pieces have all been read."""
    missing = Counter(PIECE.fullmatch(part.target)[1] for row in rows for part in row.parts)
    read = defaultdict(dict)
    for target, tensor in tensors:
        name, first, kind, which = PIECE.fullmatch(target).groups()
        read[name].setdefault(int(first), (kind, {}))[1][which] = tensor
        missing[name] -= 1
        if not missing[name]:
            yield name, layer_of(read.pop(name), dtype)


def _packed(layer, dtype, device, ops):
    if isinstance(layer, Stacked):
        return Stacked([_packed(part, dtype, device, ops) for part in layer.parts])
    if isinstance(layer, Linear):
        return Linear(ops.pack(layer.weight.to(device)), None if layer.bias is None else layer.bias.to(device))
    return ops.pack_quantized(layer.to(device), dtype)
