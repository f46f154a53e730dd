"""Folding of a tower before it is traced: blocks of one kind are traced once.

Takes a tower, returns a module in which every repeated block is a placeholder operator, with one
block of each kind beside it. `expand.py` undoes this in the ONNX graph.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from models.network.vision_blocks import repeated_lists

PLACEHOLDER = "placeholder"  # domain of our own operators


@dataclass
class Call:
    """One repeated block of the tower: its path, and its tensors of a forward pass.

    `kind`: the index of the template that it equals, set by `fold`.
    """

    path: str
    block: nn.Module
    inputs: tuple
    output: torch.Tensor
    kind: int | None = None

    def signature(self) -> tuple:
        """Equal for blocks that trace to the same graph: classes, settings, shapes, dtypes."""
        modules = []
        for path, module in self.block.named_modules():
            settings = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            modules.append((path, type(module).__name__, repr(settings)))
        shapes = []
        for tensor in (*self.block.parameters(), *self.inputs):
            shapes.append((tuple(tensor.shape), tensor.dtype))
        return tuple(modules), tuple(shapes)


class Placeholder(nn.Module):
    """Stands for a block during the trace: one ONNX node whose operator is `name`."""

    def __init__(self, name: str, like: torch.Tensor):
        super().__init__()
        self.operator = f"{PLACEHOLDER}::{name}"
        self.shape = tuple(like.shape)
        self.dtype = like.dtype

    def forward(self, *inputs):
        return torch.onnx.ops.symbolic(
            self.operator, inputs, dtype=self.dtype, shape=self.shape, version=1
        )


class Folded(nn.Module):
    """The tower with placeholders, and beside it `templates`: one block of each kind.

    A forward pass takes the tower's inputs, then those of every template.
    """

    def __init__(
        self, tower: nn.Module, tower_inputs: int, calls: list[Call], templates: list[Call]
    ):
        super().__init__()
        self.tower_inputs = tower_inputs
        self.tower = tower
        self.calls = calls
        self.templates = nn.ModuleList(template.block for template in templates)
        self.template_inputs = [template.inputs for template in templates]

    def forward(self, *inputs):
        rest = iter(inputs)
        tower_inputs = list(islice(rest, self.tower_inputs))
        outputs = []
        for block, own in zip(self.templates, self.template_inputs):
            outputs.append(block(*islice(rest, len(own))))
        return self.tower(*tower_inputs), *outputs


def fold(tower: nn.Module, inputs: list[torch.Tensor]) -> Folded:
    """Replace the repeated blocks of `tower`, which takes `inputs`, by placeholders named call0,
    call1, ..."""
    calls = repeated_blocks(tower, inputs)
    signatures = [call.signature() for call in calls]
    templates = {}
    for signature, call in zip(signatures, calls):
        templates.setdefault(signature, call)
    kinds = list(templates)
    for index, call in enumerate(calls):
        call.kind = kinds.index(signatures[index])
        tower.set_submodule(call.path, Placeholder(f"call{index}", call.output))
    return Folded(tower, len(inputs), calls, list(templates.values()))


def repeated_blocks(tower: nn.Module, inputs: list[torch.Tensor]) -> list[Call]:
    """Members of the tower's outermost ModuleLists that map tensors to one tensor, as called."""
    calls = []
    hooks = []
    for path in repeated_lists(tower):
        for index, block in enumerate(tower.get_submodule(path)):

            def record(module, inputs, output, path=f"{path}.{index}"):
                calls.append(Call(path, module, inputs, output))

            hooks.append(block.register_forward_hook(record))
    tower(*inputs)
    for hook in hooks:
        hook.remove()
    times = Counter(call.path for call in calls)
    return [call for call in calls if times[call.path] == 1 and _takes_tensors_only(call)]


def _takes_tensors_only(call: Call) -> bool:
    return all(isinstance(value, torch.Tensor) for value in (*call.inputs, call.output))
