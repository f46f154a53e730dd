"""Quantised checkpoints as msmodelslim writes them: a linear layer's tensors and their meaning.

Takes a directory's description (`quant_model_description.json`, tensor name -> kind) and a family's
float weight table; returns the weight table of the quantised directory and, from its tensors, the
layers that the operators compute with. Names are those of the float checkpoint: linear layer X has
X.weight int8 and, according to its kind, some of TENSORS.

Row permutations that unify the ropes apply to int8 rows, their scales and their biases alike.
Layers that become one (q, k, v) may differ in kind, so their pieces are kept apart until all are
read: each has a Target of its own, with its kind and the row at which it begins.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from models.errors import ModelError
from models.family import Family
from models.network.linear import Linear, Stacked
from models.side_files import is_there, read_json

from .reader import SHOWN, Checkpoint
from .table import Part, Target, Weight, WeightTable

FILE = "quant_model_description.json"
STATIC = ("W8A8", "W8A8S")  # activations quantised with stored scales
NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "final_norm")
FUSED = ".gate_up_proj.weight"
# tensor of a linear layer [n, k] -> (its shape, dtypes). D in msmodelslim's files: the model's
# float type, or float32
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TENSORS = {
    "weight": (lambda n, k: (n, k), (torch.int8,)),
    "weight_scale": (lambda n, k: (n, 1), FLOATS),
    "weight_offset": (lambda n, k: (n, 1), FLOATS),
    "input_scale": (lambda n, k: (1,), FLOATS),
    "input_offset": (lambda n, k: (1,), FLOATS),
    "quant_bias": (lambda n, k: (n,), (torch.int32,)),
    "deq_scale": (lambda n, k: (n,), (torch.int64, torch.float32)),
}
SCALARS = ("input_scale", "input_offset")


@dataclass(frozen=True)
class Kind:
    """Tensors a linear layer must have, and those it may have, which nothing reads."""

    needed: tuple[str, ...]
    unused: tuple[str, ...] = ()


_STATIC = Kind(
    ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale"),
    ("weight_scale", "weight_offset"),
)
_WEIGHTS = Kind(("weight", "weight_scale", "weight_offset"))
KINDS = {"W8A8": _STATIC, "W8A8S": _STATIC, "W8A8_DYNAMIC": _WEIGHTS, "W8A16": _WEIGHTS}
COMPRESSED = {
    "W8A8SC": "it is compressed for MindIE-LLM on the 310P, and only the NPU's own kernel can "
    "decompress it; run the W8A8S directory it was made from",
    "W16A16SC": "it is compressed for MindIE-LLM on the 310P, and only the NPU's own kernel can "
    "decompress it; run the directory it was made from",
}


@dataclass
class Quantized:
    """Linear layer [n, k] with int8 weights. Symmetric rows: w[i, j] = weight[i, j] * scale[i].

    W8A8, W8A8S: q = clamp(round(x / input_scale + input_offset), -128, 127); y = (q @ weight.T +
    bias) * scale, where scale float32 [n] is deq_scale and bias int32 [n] is quant_bias (the float
    bias and the offset are in it). W8A8_DYNAMIC: s = max|x| / 127 of each token, q = round(x / s);
    y = (q @ weight.T) * s * scale + bias. W8A16: y = x @ (weight * scale).T + bias.  bias float32
    [n] or None in the last two.
    """

    kind: str
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    input_scale: float = 0.0
    input_offset: int = 0

    @property
    def static(self) -> bool:
        return self.kind in STATIC

    def to(self, device) -> "Quantized":
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), scale=self.scale.to(device), bias=bias)


@dataclass
class Description:
    """What `quant_model_description.json` says."""

    file: Path
    type: str  # the directory's type, as MindIE calls it
    kinds: dict[str, str]  # of every tensor
    halves: dict[str, str] = field(default_factory=dict)  # of names only: see `halves_of`

    def kind(self, layer: str) -> str:
        """Kind of the linear layer's weight; "FLOAT" if it is not quantised, or no linear layer."""
        if layer.endswith(".module"):  # the older layout's second copy of a norm
            return "FLOAT"
        kind = self.kinds.get(layer + ".weight")
        return kind if kind in KINDS or kind in COMPRESSED else "FLOAT"


def read_description(file: Path) -> Description:
    entries = read_json(file)
    if not isinstance(entries.get("model_quant_type"), str):
        raise ModelError(
            f"{file} has no model_quant_type; it is not a description that msmodelslim wrote"
        )
    kinds = {}
    for name, kind in entries.items():
        if "." in name and isinstance(kind, str):  # the others are settings, which may be new
            kinds[name] = kind
    halves = {name: kinds.pop(name) for name in halves_of(kinds) if name in kinds}
    return Description(file, entries["model_quant_type"], kinds, halves)


def halves_of(kinds: dict[str, str]) -> dict[str, str]:
    """{name: kind} of the halves of fused weights: vllm-ascend looks up gate_proj and up_proj in the
    description where GLM stores gate_up_proj. They are names only, without tensors.
    """
    halves = {}
    for name, kind in kinds.items():
        if name.endswith(FUSED):
            for half in ("gate_proj", "up_proj"):
                halves[name.replace("gate_up_proj", half)] = kind
    return halves


def find_description(directory) -> Description | None:
    """The directory's description; None for a float checkpoint.

    It may have its older name, quant_model_description_<kind>.json, or be in the folder of the
    first rank, part0-of-N, where each rank has one.
    """
    directory = Path(directory)
    files = [directory / FILE, *sorted(directory.glob("quant_model_description_*.json"))]
    for file in (*files, *sorted(directory.glob(f"part0-of-*/{FILE}"))):
        if is_there(file):
            return read_description(file)
    return None


def stored_weights(family: Family) -> WeightTable:
    """The weight table of the family's directory, float or quantised."""
    description = find_description(family.directory)
    if description is None:
        return WeightTable(family.weights())
    return WeightTable(quantized_weights(family.weights(), description))


def quantized_weights(weights: Iterable[Weight], description: Description) -> Iterator[Weight]:
    """The float table's rows -> rows of the quantised directory.

    ModelError for kinds that cannot be computed.
    """
    refuse_unknown(description)
    rows = list(weights)
    in_pieces = set()  # modules of which at least one piece is quantised
    for row in rows:
        if row.tensor == "weight" and description.kind(row.module) in KINDS:
            in_pieces.update(part.target.module for part in row.parts)
    for row in rows:
        kind = description.kind(row.module)
        if kind in KINDS and row.tensor == "weight":
            yield from _layer_rows(row, kind)
        elif kind in STATIC and row.tensor == "bias":
            yield replace(row, parts=(), optional=True)  # it is in quant_bias
        else:
            yield _float_row(row, kind, in_pieces)
            yield from _norm_extras(row, rows, description)


def refuse_unknown(description: Description):
    """ModelError for a kind of tensor that nothing here computes."""
    known = {*KINDS, "FLOAT", "W16A16S"}  # the last: float with zeros
    unknown = set(description.kinds.values()) - known
    if unknown:
        kind = min(unknown)
        advice = COMPRESSED.get(kind, f"known are {', '.join(KINDS)}")
        raise ModelError(
            f"{description.file} has tensors of kind {kind}, "
            f"which this toolkit does not compute: {advice}"
        )


def check_stored(description: Description, checkpoint: Checkpoint):
    """ModelError unless description and weights name the same tensors, in the dtypes of TENSORS."""
    described = set(description.kinds)
    stored = set(checkpoint.names)
    differences = {
        "described but not stored": described - stored,
        "stored but not described": stored - described,
    }
    problems = []
    for what, names in differences.items():
        if names:
            problems.append(f"{len(names)} tensors {what}, e.g. {min(names)}")
    for name in sorted(described & stored):
        if not _right_dtype(name, description, checkpoint):
            problems.append(f"{name} is {checkpoint.dtype(name)}")
    if problems:
        shown = "; ".join(problems[:SHOWN])
        if len(problems) > SHOWN:
            shown += f" and {len(problems) - SHOWN} more"
        raise ModelError(
            f"{description.file} does not fit the weights beside it: {shown}; "
            "take both from one run"
        )


def _right_dtype(name: str, description: Description, checkpoint: Checkpoint) -> bool:
    layer, _, tensor = name.rpartition(".")
    kind = KINDS.get(description.kind(layer))
    if kind is None or tensor not in kind.needed:
        return True
    _, dtypes = TENSORS[tensor]
    return checkpoint.dtype(name) in dtypes


def _piece(part: Part, kind: str, tensor: str) -> Part:
    """The part as a piece of its own, which holds the `tensor` of a linear layer of `kind`."""
    first_row = part.at[0] if part.at else 0
    target = Target(part.target.module, tensor, first_row, kind)
    return replace(part, target=target, at=None)


def _float_row(row: Weight, kind: str, in_pieces: set[str]) -> Weight:
    """The same row, but for float parts of a module of which other pieces are quantised."""
    parts = []
    for part in row.parts:
        if part.target.module in in_pieces:
            part = _piece(part, kind, part.target.tensor)
        parts.append(part)
    return replace(row, parts=tuple(parts))


def _layer_rows(row: Weight, kind: str) -> Iterator[Weight]:
    layer = row.module
    for tensor in KINDS[kind].needed:
        parts = tuple(_piece(part, kind, tensor) for part in row.parts)
        if tensor in SCALARS:
            parts = tuple(replace(part, take=None, transform=None) for part in parts)
        yield Weight(f"{layer}.{tensor}", TENSORS[tensor][0](*row.shape), parts)
    for tensor in KINDS[kind].unused:
        yield Weight(f"{layer}.{tensor}", TENSORS[tensor][0](*row.shape), optional=True)


def _norm_extras(row: Weight, rows: list[Weight], description: Description) -> Iterator[Weight]:
    """Rows of what anti-outlier adds to a norm: a bias.

    The older layout also writes weight and bias a second time, as X.module.*.
    """
    if not row.parts or row.target.role not in NORMS or row.tensor != "weight":
        return
    bias = row.module + ".bias"
    if bias in description.kinds and all(other.source != bias for other in rows):
        yield Weight(bias, row.shape, (Part(Target(row.target.module, "bias")),))
    for name in (".module.weight", ".module.bias"):
        yield Weight(row.module + name, row.shape, optional=True)


# tensors -> layers


def layer_of(pieces: dict[int, tuple[str, dict[str, torch.Tensor]]], dtype: torch.dtype):
    """A complete layer's pieces {first row: (kind, tensors)} -> one layer.

    Quantized, Linear (of `dtype`), or Stacked if the pieces differ in kind or scale. ModelError for
    a weight offset: the symmetric kernels of the NPU have no place for it.
    """
    layers = []
    for _, (kind, tensors) in sorted(pieces.items()):
        layer = _linear(tensors, dtype) if kind == "FLOAT" else _quantized(kind, tensors)
        if layers and (joined := _joined(layers[-1], layer)):
            layers[-1] = joined
        else:
            layers.append(layer)
    return layers[0] if len(layers) == 1 else Stacked(layers)


def float_scale(deq_scale: torch.Tensor) -> torch.Tensor:
    """deq_scale as float32: stored so for bfloat16 models.

    For float16 ones its bits are the low half of an int64.
    """
    if deq_scale.dtype == torch.int64:
        return deq_scale.to(torch.int32).view(torch.float32)
    return deq_scale.float()


def as_stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 scales as deq_scale of this dtype: the inverse of `float_scale`."""
    if dtype != torch.int64:
        return scale.to(dtype)
    return scale.view(torch.int32).to(torch.int64)


def _linear(tensors, dtype) -> Linear:
    bias = tensors.get("bias")
    return Linear(tensors["weight"].to(dtype), None if bias is None else bias.to(dtype))


def _quantized(kind: str, tensors: dict[str, torch.Tensor]) -> Quantized:
    if kind in STATIC:
        return Quantized(
            kind,
            tensors["weight"],
            float_scale(tensors["deq_scale"]),
            tensors["quant_bias"],
            tensors["input_scale"].item(),
            int(tensors["input_offset"].item()),
        )
    if tensors["weight_offset"].any():
        raise ModelError(
            f"a {kind} layer has weight offsets; quantise with symmetric weights (w_sym=True)"
        )
    bias = tensors["bias"].float() if "bias" in tensors else None
    return Quantized(kind, tensors["weight"], tensors["weight_scale"].float().flatten(), bias)


def _joined(first: Quantized | Linear, second: Quantized | Linear):
    """The rows of both as one layer; None unless kinds and activation scales are equal.

    Either both have a bias or none.
    """
    if _settings(first) != _settings(second):
        return None
    together = {}
    for name in ("weight", "scale", "bias"):
        if getattr(first, name, None) is not None:
            together[name] = torch.cat((getattr(first, name), getattr(second, name)))
    return replace(first, **together)


def _settings(layer: Quantized | Linear) -> list:
    """What two layers must have in common to be joined; a Linear has no kind and no scales."""
    names = ("kind", "input_scale", "input_offset")
    return [*(getattr(layer, name, None) for name in names), layer.bias is None]
