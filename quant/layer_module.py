"""One decoder layer as a plain float32 module, whose submodules have the names that the checkpoint
gives them.

Takes a family, its checkpoint and residual streams before the layer, returns the residual streams
after it. msmodelslim rescales the module's weights and replaces its linear layers. The arithmetic
is the runtime's own (network/decoder.py); weight rows are in the checkpoint's order, and the
outputs of each linear layer are reordered for the runtime.
"""

import gc
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from models.checkpoint.table import Weight, WeightTable
from models.network.decoder import LINEARS, NORMS, POST_NORMS, Layer, LayerArithmetic
from models.network.rope import rotary_angles
from runtime.common.allocator import return_freed_memory
from runtime.engine.loading.weights import check_finite
from runtime.ops.cpu.ops import CpuOps, sequence_attention
from runtime.ops.reference import ReferenceOps

NO_CACHE = SimpleNamespace(layers=[(None, None)])


@dataclass
class SampleStep:
    """cos, sin: rotary rows [T, head_dim] of one sample. Its first `context` tokens attend to each
    other in both directions, the others causally."""

    cos: torch.Tensor
    sin: torch.Tensor
    context: int
    slots: None = None


def sample_step(config, positions, context: int) -> SampleStep:
    """positions: int64 array [T, channels]."""
    cos, sin = rotary_angles(config.rope, config.head_dim, torch.from_numpy(positions))
    return SampleStep(cos, sin, context)


class LayerOps(CpuOps):
    """The runtime's arithmetic over whole samples, without a KV cache. Norms may be modules, which
    are then called."""

    def rms_norm(self, x, norm, eps):
        return norm(x) if callable(norm) else super().rms_norm(x, norm, eps)

    def layer_norm(self, x, norm, eps):
        return norm(x) if callable(norm) else super().layer_norm(x, norm, eps)

    attend = ReferenceOps.attend  # from the angles, which are all that a SampleStep has
    rotated_qkv = ReferenceOps.rotated_qkv

    def cache_write(self, k, v, keys, values, slots):
        pass

    def attention(self, q, k, v, keys, values, step):
        context = step.context
        outputs = []
        if context:
            outputs.append(sequence_attention(q[:context], k[:context], v[:context], False))
        if context < len(q):
            outputs.append(sequence_attention(q[context:], k, v, True))
        return torch.cat(outputs)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, as the reference operators compute it."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class LayerModule(nn.Module):
    """Layer `index` of `family`. forward(input_ids [1]: number of a sample) -> [1, T, hidden].

    streams: residual stream [T, hidden] of every sample before the layer. outputs: after it, as
    last computed. groups: names of the linear layers that become each of LINEARS in the runtime, in
    the order of its rows. norms: names of the norms, by those of NORMS and POST_NORMS.
    """

    def __init__(self, family, checkpoint, index: int, steps: list[SampleStep]):
        super().__init__()
        self.family = family
        self.steps = steps
        self.streams = []
        self.outputs = {}
        self.groups = defaultdict(list)
        self.norms = {}
        self._row_orders = {}
        for row in sorted(WeightTable(family.weights()).layer(index), key=_place):
            if row.tensor == "weight":
                self._add(row, checkpoint)
        modules = {target: partial(self._call, [name]) for target, name in self.norms.items()}
        for target, names in self.groups.items():
            modules[target] = partial(self._call, names)
        self._layer = Layer(**modules)
        self._arithmetic = LayerArithmetic(family.decoder, LayerOps())

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def dtype(self):
        return torch.float32

    @torch.inference_mode()
    def forward(self, input_ids, attention_mask=None):
        number = int(input_ids[0])
        self.outputs[number] = self.run(self.streams[number], number)
        return self.outputs[number][None]

    def run(self, x, number: int):
        """Residual stream of sample `number` before the layer -> after it."""
        return self._arithmetic.layer(x, self._layer, 0, self.steps[number], NO_CACHE)

    @torch.inference_mode()
    def float_outputs(self, streams: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Residual streams {number of a sample: [T, hidden]} before the layer -> after it."""
        return {number: self.run(stream, number) for number, stream in streams.items()}

    @property
    def linear_names(self) -> list[str]:
        names = []
        for group in LINEARS:
            names += self.groups[group]
        return names

    def linear_tensors(self) -> dict[str, torch.Tensor]:
        """Weights and biases of the linear layers, by the checkpoint's names."""
        tensors = {}
        state = self.state_dict()
        for linear in self.linear_names:
            for name in (f"{linear}.weight", f"{linear}.bias"):
                if name in state:
                    tensors[name] = state[name]
        return tensors

    def _call(self, names, x):
        """Outputs [T, n] of the named modules side by side, in the runtime's order of rows; the
        modules get a batch axis, which msmodelslim expects."""
        outputs = []
        for name in names:
            y = self.get_submodule(name)(x[None])[0]
            order = self._row_orders.get(name)
            outputs.append(y if order is None else y[:, order])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _norm(self, weight, bias=None):
        eps = self.family.decoder.eps
        if self.family.decoder.norm == "rms":
            return RMSNorm(weight, eps)
        norm = nn.LayerNorm(len(weight), eps)
        norm.weight.data = weight
        norm.bias.data = bias
        return norm

    def _add(self, row: Weight, checkpoint):
        """Add the norm or linear layer of which `row` is the weight."""
        name = row.module
        target = row.target.role
        stored = [name + end for end in (".weight", ".bias") if name + end in checkpoint.shapes]
        tensors = [_finite(checkpoint, tensor).float() for tensor in stored]
        if target in (*NORMS, *POST_NORMS):
            self.norms[target] = name
            self._add_submodule(name, self._norm(*tensors))
        else:
            self.groups[target].append(name)
            self._row_orders[name] = _row_order(row)
            self._add_submodule(name, _linear(*tensors))

    def _add_submodule(self, name: str, module: nn.Module):
        parent = self
        *parents, last = name.split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)


def _finite(checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.tensor(name)
    check_finite(name, tensor)
    return tensor


def _linear(weight, bias=None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _row_order(row: Weight) -> torch.Tensor | None:
    """The checkpoint's row for each of the runtime's rows; None: the order is the same."""
    transform = row.parts[0].transform
    return None if transform is None else transform(torch.arange(row.shape[0]))


def linear_groups(family) -> dict[tuple[int, str], list[str]]:
    """{(layer, one of LINEARS): the checkpoint's names of the linear layers that become it, in the
    order of its rows}."""
    groups = defaultdict(list)
    for row in sorted(WeightTable(family.weights()).layers(), key=_place):
        target = row.target
        if target.role in LINEARS and target.tensor == "weight":
            groups[target.layer, target.role].append(row.module)
    return dict(groups)


def _place(row: Weight) -> tuple[int, int]:
    """(row at which it begins in its target, the target's rows), for sorting; (0, 0): it is the
    whole target."""
    return row.parts[0].at or (0, 0)


def relative_error(expected: torch.Tensor, found: torch.Tensor, before: torch.Tensor) -> float:
    """Norm of the error of what a layer adds to the residual stream `before`, relative to the norm
    of what it adds."""
    return ((found - expected).norm() / (expected - before).norm().clamp(min=1e-30)).item()


def release_memory():
    """Free modules now: they refer to themselves and otherwise wait for the collector. glibc keeps
    the holes that large tensors leave, unless it is asked to return them."""
    gc.collect()
    return_freed_memory()
