"""The weight table: which tensors of a checkpoint make which weight of the model."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Where (a piece of) a checkpoint tensor goes. `take` = rows of the source, `at` = (row offset, total rows) in the target.

    `transform` is applied to the piece (fp tensors of any dtype) before it is stored; one on q rows alone, or on k rows
    alone, works head by head, so that it also serves for some of the heads.
    """

    target: str
    take: tuple[int, int] | None = None
    at: tuple[int, int] | None = None
    transform: Callable | None = None


@dataclass(frozen=True)
class Weight:
    """One row of a weight table: checkpoint name, its exact shape, and where its parts go (none = known and dropped)."""

    source: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    optional: bool = False


def pair(source: str, shape: tuple[int, ...], target: str, transform=None, bias: bool = True):
    """Table rows of a layer's weight and bias; the bias has the weight's first dimension and the same transform."""
    yield Weight(source + ".weight", shape, (Part(target + ".weight", transform=transform),))
    if bias:
        yield Weight(source + ".bias", shape[:1], (Part(target + ".bias", transform=transform),))


def transposed(weight):
    return weight.t()


def dense(source: str, outputs: int, inputs: int, target: str, bias: bool = True):
    """Table rows of a tower's linear layer, whose weight we keep as [in, out]."""
    yield Weight(
        source + ".weight", (outputs, inputs), (Part(target + ".weight", transform=transposed),)
    )
    if bias:
        yield Weight(source + ".bias", (outputs,), (Part(target + ".bias"),))


def fused_dense(source: str, outputs: int, inputs: int, targets: list[str]):
    """Table rows of a tower's fused projection (row blocks of `outputs` each), split into one linear layer per target."""

    def parts(suffix, transform=None):
        return tuple(
            Part(t + suffix, take=(i * outputs, (i + 1) * outputs), transform=transform)
            for i, t in enumerate(targets)
        )

    total = outputs * len(targets)
    yield Weight(source + ".weight", (total, inputs), parts(".weight", transposed))
    yield Weight(source + ".bias", (total,), parts(".bias"))
