"""One decoder layer as a plain module in float32, whose parts have the names that the checkpoint gives them.

A family, its checkpoint and the residual streams of some samples flow in; msmodelslim looks at the module, replaces its
linear layers, and the residual streams behind the layer flow out. The arithmetic is the runtime's own (network/decoder.py);
rows stand as in the checkpoint and are brought into the runtime's order behind each linear layer.
"""

import gc
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from models.checkpoint.table import Weight, WeightTable
from models.network.decoder import LINEARS, NORMS, Layer, LayerArithmetic
from models.network.rope import rotary_angles
from runtime.common.processes import return_freed_memory
from runtime.ops.cpu.ops import CpuOps, sequence_attention
from runtime.ops.reference import ReferenceOps

NO_CACHE = SimpleNamespace(layers=[(None, None)])


@dataclass
class SampleStep:
    """Rotary rows [T, head_dim] of one sample; its first `context` tokens see each other both ways."""

    cos: torch.Tensor
    sin: torch.Tensor
    context: int
    slots: None = None


def sample_step(config, positions, context: int) -> SampleStep:
    cos, sin = rotary_angles(config.rope, config.head_dim, torch.from_numpy(positions))
    return SampleStep(cos, sin, context)


class LayerOps(CpuOps):
    """The runtime's arithmetic over whole samples, without a cache; norms and linear layers are what the layer says."""

    def rms_norm(self, x, norm, eps):
        return norm(x) if callable(norm) else super().rms_norm(x, norm, eps)

    def layer_norm(self, x, norm, eps):
        return norm(x) if callable(norm) else super().layer_norm(x, norm, eps)

    attend = ReferenceOps.attend  # from the angles, which are all that a SampleStep has
    rotated_qkv = ReferenceOps.rotated_qkv

    def cache_write(self, k, v, keys, values, slots):
        pass

    def attention(self, q, k, v, keys, values, step):
        c = step.context
        spans = [(q[:c], k[:c], v[:c], False)] if c else []
        spans += [(q[c:], k, v, True)] if c < len(q) else []
        return torch.cat([sequence_attention(*span) for span in spans])


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

    `stream`: residual stream [T, hidden] of every sample before the layer; `outputs`: behind it, as last computed.
    `groups`: names of the linear layers that become each of LINEARS in the runtime, in the order of its rows.
    """

    def __init__(self, family, checkpoint, index: int, steps: list[SampleStep]):
        super().__init__()
        self.family = family
        self.steps = steps
        self.stream = []
        self.outputs = {}
        self.groups = defaultdict(list)
        self._orders = {}
        norms = {}
        for row in sorted(WeightTable(family.weights()).layer(index), key=_place):
            if row.tensor != "weight":
                continue
            name = row.module
            target = row.target.role
            stored = [name + end for end in (".weight", ".bias") if name + end in checkpoint.shapes]
            tensors = [checkpoint.tensor(tensor).float() for tensor in stored]
            if target in NORMS:
                norms[target] = name
                self._put(name, self._norm(*tensors))
            else:
                self.groups[target].append(name)
                self._orders[name] = _order(row)
                self._put(name, _linear(*tensors))
        self._layer = Layer(
            **{target: partial(self._call, [name]) for target, name in norms.items()},
            **{target: partial(self._call, names) for target, names in self.groups.items()},
        )
        self._arithmetic = LayerArithmetic(family.decoder, LayerOps())
        self.norms = norms

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def dtype(self):
        return torch.float32

    @torch.inference_mode()
    def forward(self, input_ids, attention_mask=None):
        number = int(input_ids[0])
        self.outputs[number] = self.run(self.stream[number], number)
        return self.outputs[number][None]

    def run(self, x, number: int):
        """Residual stream of sample `number` before the layer -> behind it."""
        return self._arithmetic.layer(x, self._layer, 0, self.steps[number], NO_CACHE)

    def float_outputs(self, stream: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        with torch.inference_mode():
            return {number: self.run(x, number) for number, x in stream.items()}

    @property
    def linear_names(self) -> list[str]:
        return [name for group in LINEARS for name in self.groups[group]]

    def _call(self, names, x):
        """Outputs [T, n] of the named modules side by side, rows in the runtime's order; msmodelslim wants a batch axis."""
        outputs = []
        for name in names:
            y = self.get_submodule(name)(x[None])[0]
            order = self._orders.get(name)
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

    def _put(self, name, module):
        parent = self
        parts = name.split(".")
        for part in parts[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(parts[-1], module)


def _linear(weight, bias=None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _order(row: Weight) -> torch.Tensor | None:
    """Which checkpoint row stands at each of the runtime's rows; None: they stand alike."""
    transform = row.parts[0].transform
    return None if transform is None else transform(torch.arange(row.shape[0]))


def linear_groups(family) -> dict[tuple[int, str], list[str]]:
    """(layer, one of LINEARS) -> the checkpoint's names of the linear layers that become it, in the order of its rows."""
    groups = defaultdict(list)
    for row in sorted(WeightTable(family.weights()).layers(), key=_place):
        target = row.target
        if target.role in LINEARS and target.tensor == "weight":
            groups[target.layer, target.role].append(row.module)
    return dict(groups)


def _place(row: Weight) -> tuple[int, int]:
    """(row at which it begins in its target, the target's rows), for sorting; (0, 0): it is the target."""
    return row.parts[0].at or (0, 0)


def release_memory():
    """Modules refer to themselves and wait for the collector; glibc keeps the holes that large tensors leave."""
    gc.collect()
    return_freed_memory()
