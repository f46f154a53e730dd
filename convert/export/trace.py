"""The trace of a vision tower. Takes the tower without weight values, returns its ONNX graph at
opset 17, with the weights as inputs without data.

Towers repeat one block dozens of times, and tracing costs most of a second per block. So every
distinct block is traced once: in the tower it is replaced by a placeholder operator (fold.py), the
blocks are part of the same export with inputs and outputs of their own, and the placeholders are
expanded in the ONNX graph (expand.py).
"""

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.config import PatchSpec, VisionSpec
from runtime.common.errors import CHECK_FAILED, ToolkitError

from .expand import SCOPES, expand
from .fold import Folded, fold
from .free_patches import free_patches, traced_shape

OPSET = 17
TRACE_OPSET = 18  # the oldest that torch writes; see `_relabel`


def trace(build: Callable[[], nn.Module], spec: VisionSpec | PatchSpec) -> ir.Model:
    """ONNX graph of the tower that `build()` makes: inputs and output as `spec` says, opset 17,
    fp32, all dimensions fixed but the free ones of `spec`.

    The tower's parameters are graph inputs without data, named as in the module; the caller gives
    them values. Nodes are named after the module they come from. ToolkitError if an operator has no
    opset-17 form.
    """
    with torch.device("meta"), torch.no_grad():
        tower = build().eval().requires_grad_(False)
        inputs = [torch.empty(traced_shape(shape)) for shape in spec.inputs.values()]
        folded = fold(tower, inputs)
    model = _export(folded, inputs)
    weights = _weights_to_inputs(model.graph)
    optimizer.optimize(model)
    _relabel(model)
    expand(model, folded, weights)
    _name(model.graph, spec)
    if isinstance(spec, PatchSpec):
        free_patches(model.graph)
    return model


def _export(folded: Folded, tower_inputs: list[torch.Tensor]) -> ir.Model:
    """`folded` and its inputs are on the meta device; the exporter sees fake CPU tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _quiet():
        inputs = []
        for tensors in (tower_inputs, *folded.template_inputs):
            for tensor in tensors:  # one tensor, one input: no aliases
                inputs.append(torch.empty(tensor.shape, dtype=tensor.dtype))
        return torch.onnx.export(
            folded.eval().to_empty(device="cpu"),
            tuple(inputs),
            dynamo=True,
            opset_version=TRACE_OPSET,
            optimize=False,
            external_data=False,
            verbose=False,
        ).model


def _weights_to_inputs(graph: ir.Graph) -> dict[str, ir.Value]:
    """Make graph inputs of the parameters, so that no pass asks for their data; {name: value}.

    True constants stay as they are.
    """
    weights = {}
    for name, value in list(graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), nn.Parameter):
            weights[name.removeprefix("tower.")] = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
    return weights


def _relabel(model: ir.Model):
    """Opset 18 -> 17 by number, if both define every operator in use identically; the axes of
    ReduceMean are an attribute in 17."""
    changed = set()
    for node in model.graph:
        if node.op_type == "ReduceMean":
            _axes_to_attribute(node)
        elif node.domain == "":
            since = onnx.defs.get_schema(node.op_type, TRACE_OPSET).since_version
            if since > OPSET:
                changed.add(node.op_type)
    if changed:
        raise ToolkitError(
            f"the tower uses {', '.join(sorted(changed))}, which opset {OPSET} defines differently; "
            "write that step of the model with other operators",
            CHECK_FAILED,
        )
    model.graph.opset_imports[""] = OPSET


def _axes_to_attribute(node: ir.Node):
    axes = ir.convenience.get_const_tensor(node.inputs[1])
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)


def _name(graph: ir.Graph, spec: VisionSpec | PatchSpec):
    """Name nodes "module path/operator", values after their node, input and output as `spec`."""
    _name_nodes(graph)
    for index, value in enumerate(list(graph.initializers.values())):
        value.name = f"constant_{index}"
    for name, value in zip(spec.inputs, graph.inputs):
        value.name = name
    graph.outputs[0].name = spec.output_name
    graph.name = "vision"
    graph.metadata_props.clear()


def _name_nodes(graph: ir.Graph):
    seen = Counter()
    for node in graph:
        base = _module_and_operator(node)
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
        node.metadata_props.clear()


def _module_and_operator(node: ir.Node) -> str:
    """E.g. "vit.blocks.2.attention.q/MatMul"; the last scope is the node's own."""
    scopes = ast.literal_eval(node.metadata_props.pop(SCOPES, "[]"))
    if len(scopes) < 2:
        return node.op_type
    module = scopes[-2].removeprefix("tower").removeprefix(".")
    return f"{module}/{node.op_type}" if module else node.op_type


@contextmanager
def _quiet():
    """Silence torch.onnx about opsets, torchvision and its deprecations: no user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
