"""A vision tower without weight values in, its ONNX graph (opset 17, weights as named slots) out.

Towers repeat one block dozens of times, and tracing costs most of a second per block. So every distinct block is traced
once: in the tower it is replaced by a placeholder operator, the blocks ride along in the same export with inputs and
outputs of their own, and the placeholders are expanded in the ONNX graph.
"""

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.config import VisionSpec
from models.network.vision_blocks import repeated_lists
from runtime.common.errors import CHECK_FAILED, ToolkitError

OPSET = 17
TRACE_OPSET = 18  # the oldest that torch writes; see `_relabel`
PLACEHOLDER = "placeholder"
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass
class Call:
    """One repeated block of the tower: where it stands and the tensors it met in a forward pass."""

    path: str
    block: nn.Module
    inputs: tuple
    output: torch.Tensor

    def signature(self) -> tuple:
        """Equal for blocks that trace to the same graph: classes, settings, parameter and input shapes."""
        modules = tuple(
            (name, type(m), repr({k: v for k, v in vars(m).items() if not k.startswith("_")}))
            for name, m in self.block.named_modules()
        )
        tensors = (*self.block.parameters(), *self.inputs)
        return modules, tuple((tuple(t.shape), t.dtype) for t in tensors)


class Placeholder(nn.Module):
    """Stands for a block during the trace: one ONNX node of our own domain, `name` as its operator."""

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
    """The tower with placeholders, and beside it each distinct block applied to inputs of its own."""

    def __init__(self, tower: nn.Module, templates: list[Call]):
        super().__init__()
        self.tower = tower
        self.templates = nn.ModuleList(call.block for call in templates)
        self.counts = [len(call.inputs) for call in templates]

    def forward(self, pixels, *inputs):
        rest = iter(inputs)
        outputs = [
            block(*(next(rest) for _ in range(count)))
            for block, count in zip(self.templates, self.counts)
        ]
        return self.tower(pixels), *outputs


@dataclass
class Body:
    """The ONNX nodes of one distinct block; `inputs` and `output` are where a placeholder's values go."""

    inputs: list[ir.Value]
    output: ir.Value
    nodes: list[ir.Node]


def trace(build: Callable[[], nn.Module], spec: VisionSpec) -> ir.Model:
    """ONNX graph of the tower that `build()` makes: input and output as `spec` says, opset 17, fp32, static shapes.

    The tower's parameters are graph inputs without data, named as in the module; the caller gives them values. Nodes
    are named after the module they come from. ToolkitError if an operator has no opset-17 form.
    """
    with torch.device("meta"), torch.no_grad():
        tower = build().eval().requires_grad_(False)
        pixels = torch.empty(spec.input_shape)
        calls = repeated_blocks(tower, pixels)
    templates = list({call.signature(): call for call in reversed(calls)}.values())
    kinds = {call.signature(): index for index, call in enumerate(templates)}
    for index, call in enumerate(calls):
        tower.set_submodule(call.path, Placeholder(f"call{index}", call.output))
    model = _export(
        Folded(tower, templates), [pixels, *(t for call in templates for t in call.inputs)]
    )
    weights = _weights_to_inputs(model.graph)
    _relabel(model)
    optimizer.optimize(model)
    _expand(
        model,
        weights,
        [(call.path, kinds[call.signature()]) for call in calls],
        [len(call.inputs) for call in templates],
    )
    _name(model.graph, spec)
    return model


def repeated_blocks(tower: nn.Module, pixels: torch.Tensor) -> list[Call]:
    """Members of the tower's outermost ModuleLists that map tensors to one tensor, in the order of their calls."""
    calls = []
    hooks = []
    for path in repeated_lists(tower):
        for index, block in enumerate(tower.get_submodule(path)):

            def record(module, inputs, output, path=f"{path}.{index}"):
                calls.append(Call(path, module, inputs, output))

            hooks.append(block.register_forward_hook(record))
    tower(pixels)
    for hook in hooks:
        hook.remove()
    times = Counter(call.path for call in calls)
    return [
        c
        for c in calls
        if times[c.path] == 1 and all(isinstance(t, torch.Tensor) for t in (*c.inputs, c.output))
    ]


def _export(folded: Folded, inputs: list[torch.Tensor]) -> ir.Model:
    """`folded` and `inputs` are on the meta device; the exporter sees CPU tensors without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _quiet():
        folded = folded.eval().to_empty(device="cpu")
        inputs = tuple(
            torch.empty(t.shape, dtype=t.dtype) for t in inputs
        )  # one tensor, one input: no aliases
        return torch.onnx.export(
            folded,
            inputs,
            dynamo=True,
            opset_version=TRACE_OPSET,
            optimize=False,
            external_data=False,
            verbose=False,
        ).model


def _weights_to_inputs(graph: ir.Graph) -> dict[str, ir.Value]:
    """Parameters become graph inputs, so that no pass asks for their data; true constants stay."""
    weights = {}
    for name, value in list(graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), nn.Parameter):
            weights[name.removeprefix("tower.")] = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
    return weights


def _relabel(model: ir.Model):
    """Opset 18 -> 17 by number, after a check that both define every operator in use identically."""
    changed = {
        node.op_type
        for node in model.graph
        if node.domain == ""
        and onnx.defs.get_schema(node.op_type, TRACE_OPSET).since_version > OPSET
    }
    if changed:
        raise ToolkitError(
            f"the tower uses {', '.join(sorted(changed))}, which opset {OPSET} defines differently; "
            "write that step of the model with other operators",
            CHECK_FAILED,
        )
    model.graph.opset_imports[""] = OPSET


def _expand(
    model: ir.Model, weights: dict[str, ir.Value], calls: list[tuple[str, int]], counts: list[int]
):
    """Replace the placeholder of each call (path, kind) by a copy of that kind's nodes, bound to the weights of `path`.

    `counts` = inputs of each kind. Afterwards the graph's inputs are the picture and the tower's weights.
    """
    graph = model.graph
    pixels, *own = graph.inputs[: 1 + sum(counts)]
    output, *ends = graph.outputs
    graph.outputs[:] = [output]
    rest = iter(own)
    bodies = [
        _body(graph, [next(rest) for _ in range(count)], end) for count, end in zip(counts, ends)
    ]
    placeholders = {node.op_type: node for node in graph if node.domain == PLACEHOLDER}
    for index, (path, kind) in enumerate(calls):
        _inline(placeholders[f"call{index}"], bodies[kind], path, f"templates.{kind}", weights)
    graph.remove([node for body in bodies for node in reversed(body.nodes)])
    graph.inputs[:] = [pixels]
    for name, value in weights.items():
        if not name.startswith("templates."):
            value.name = name
            graph.inputs.append(value)
    model.opset_imports.pop(PLACEHOLDER, None)


def _body(graph: ir.Graph, inputs: list[ir.Value], output: ir.Value) -> Body:
    found = set()
    open_ends = [output.producer()]
    while open_ends:
        node = open_ends.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ends += [value.producer() for value in node.inputs if value is not None]
    return Body(inputs, output, [node for node in graph if node in found])


def _inline(node: ir.Node, body: Body, path: str, template: str, weights: dict[str, ir.Value]):
    values = dict(zip(body.inputs, node.inputs))
    for name in [n for n in weights if n.startswith(template + ".")]:
        original = weights[name]
        target = path + name.removeprefix(template)
        weights.setdefault(target, ir.Value(name=target, shape=original.shape, type=original.type))
        values[original] = weights[target]
    for source in body.nodes:
        copy = ir.Node(
            "",
            source.op_type,
            [values.get(v, v) for v in source.inputs],
            source.attributes.values(),
            outputs=[ir.Value(shape=v.shape, type=v.type) for v in source.outputs],
            metadata_props={
                SCOPES: source.metadata_props.get(SCOPES, "[]").replace(template, path)
            },
        )
        values.update(zip(source.outputs, copy.outputs))
        node.prepend(copy)
    node.outputs[0].replace_all_uses_with(values[body.output], replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def _name(graph: ir.Graph, spec: VisionSpec):
    """Nodes get module path / operator, values the name of their node; input and output get the spec's names."""
    seen = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.pop(SCOPES, "[]"))
        module = scopes[-2].removeprefix("tower").removeprefix(".") if len(scopes) > 1 else ""
        base = f"{module}/{node.op_type}" if module else node.op_type
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
        node.metadata_props.clear()
    for index, value in enumerate(list(graph.initializers.values())):
        value.name = f"constant_{index}"
    graph.inputs[0].name = spec.input_name
    graph.outputs[0].name = spec.output_name
    graph.name = "vision"
    graph.metadata_props.clear()


@contextmanager
def _quiet():
    """torch.onnx warns about opsets, torchvision and its own deprecations; none of it concerns the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
