"""The weight table: which tensors of a checkpoint make which weight of the model.

Takes names and shapes of a checkpoint's tensors, returns rows that a checkpoint is checked against
and read by; `WeightTable` finds the rows of one layer, of the decoder, of the vision encoder.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Target:
    """A tensor of the model: `tensor` ("weight", "bias", ...) of `module` ("layers.0.qkv").

    Of a quantised layer the pieces are kept apart until all are read: `kind` is then the kind of
    the piece ("FLOAT" or one of quantized.KINDS) and `first_row` the row of the module at which it
    begins.
    """

    module: str
    tensor: str
    first_row: int = 0
    kind: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Target":
        """From a canonical name: "layers.0.qkv.weight" is the "weight" of "layers.0.qkv"."""
        module, _, tensor = name.rpartition(".")
        return cls(module, tensor)

    @property
    def is_piece(self) -> bool:
        return self.kind is not None

    @property
    def role(self) -> str:
        """The module without its layer: "qkv" of "layers.0.qkv", "lm_head"."""
        return self.module.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer; None outside the layers."""
        match = LAYER.match(self.module)
        return int(match[1]) if match else None

    @property
    def in_vision(self) -> bool:
        return str(self).startswith("vision.")

    def __str__(self) -> str:
        """The canonical name; that of a piece, layers.0.qkv#256:W8A8.weight, is unique too."""
        module = f"{self.module}#{self.first_row}:{self.kind}" if self.is_piece else self.module
        return f"{module}.{self.tensor}" if module else self.tensor


@dataclass(frozen=True)
class Part:
    """Where (a piece of) a checkpoint tensor goes; `target` may be given as its canonical name.

    `take`: rows [first, last) of the source, None for all. `at`: (row offset, total rows) in the
    target, None if the part is the whole target. `transform` is applied to the piece (fp tensors of
    any dtype) before it is stored; one on q rows alone, or on k rows alone, works head by head, so
    that it also serves for some of the heads.
    """

    target: Target
    take: tuple[int, int] | None = None
    at: tuple[int, int] | None = None
    transform: Callable | None = None

    def __post_init__(self):
        if isinstance(self.target, str):
            object.__setattr__(self, "target", Target.parse(self.target))


@dataclass(frozen=True)
class Weight:
    """One row of a weight table: a checkpoint's tensor, its exact shape, and where its parts go.

    Without parts it is known and dropped; an `optional` one may be missing.
    """

    source: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    optional: bool = False

    @property
    def target(self) -> Target | None:
        """Of the first part; None for a dropped row. The others are in the same layer or tower."""
        return self.parts[0].target if self.parts else None

    @property
    def is_float(self) -> bool:
        """Whether it fills float weights, and no tensor of a quantised layer."""
        kinds = {part.target.kind for part in self.parts}
        return bool(kinds) and kinds <= {None, "FLOAT"}

    @property
    def module(self) -> str:
        """Name of the linear layer or norm in the checkpoint: the source without its last word."""
        return self.source.rpartition(".")[0]

    @property
    def tensor(self) -> str:
        """Which tensor of `module` it is: the last word of the source."""
        return self.source.rpartition(".")[2]


class WeightTable:
    """The rows of a checkpoint's weight table, found by what they fill. Iterates over all rows."""

    def __init__(self, rows: Iterable[Weight]):
        self.rows = list(rows)

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def used(self) -> list[Weight]:
        """All rows but those that are known and dropped."""
        return [row for row in self.rows if row.parts]

    def vision(self) -> list[Weight]:
        """Rows of the vision encoder."""
        return [row for row in self.used() if row.target.in_vision]

    def decoder(self) -> list[Weight]:
        """Rows of everything that is not the vision encoder."""
        return [row for row in self.used() if not row.target.in_vision]

    def layers(self) -> list[Weight]:
        """Rows of all decoder layers."""
        return [row for row in self.used() if row.target.layer is not None]

    def layer(self, index: int) -> list[Weight]:
        """Rows of one decoder layer."""
        return [row for row in self.used() if row.target.layer == index]

    def sources_of(self, name: str) -> list[str]:
        """Checkpoint names of the tensors that make the target of the canonical name."""
        target = Target.parse(name)
        return [row.source for row in self.rows if any(part.target == target for part in row.parts)]

    def source_of(self, name: str) -> str:
        """The checkpoint name of a target that is one tensor, such as lm_head.weight."""
        return self.sources_of(name)[0]


def one_to_one(source: str, shape: tuple[int, ...], target: str) -> Weight:
    """The table row of a tensor that becomes a target as it is."""
    return Weight(source, shape, (Part(target),))


def pair(source: str, shape: tuple[int, ...], target: str, transform=None, bias: bool = True):
    """Table rows of a layer's weight and bias.

    The bias has the weight's first dimension and the same transform.
    """
    yield Weight(source + ".weight", shape, (Part(target + ".weight", transform=transform),))
    if bias:
        yield Weight(source + ".bias", shape[:1], (Part(target + ".bias", transform=transform),))


def transposed(weight):
    return weight.t()


def dense(source: str, outputs: int, inputs: int, target: str, bias: bool = True):
    """Table rows of a tower's linear layer, whose weight we keep as [in, out]."""
    part = Part(target + ".weight", transform=transposed)
    yield Weight(source + ".weight", (outputs, inputs), (part,))
    if bias:
        yield Weight(source + ".bias", (outputs,), (Part(target + ".bias"),))


def fused_dense(source: str, outputs: int, inputs: int, target: str, names: str, bias: bool = True):
    """Table rows of a tower's fused projection, split into one linear layer per name.

    names: one letter per layer, in the order of the row blocks of `outputs` rows each; a layer's
    target is `target` and its name.
    """

    def parts(suffix, transform=None):
        blocks = []
        for i, name in enumerate(names):
            rows = (i * outputs, (i + 1) * outputs)
            blocks.append(Part(target + name + suffix, take=rows, transform=transform))
        return tuple(blocks)

    total = outputs * len(names)
    yield Weight(source + ".weight", (total, inputs), parts(".weight", transposed))
    if bias:
        yield Weight(source + ".bias", (total,), parts(".bias"))
