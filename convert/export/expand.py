"""Expansion of a folded tower's ONNX graph.

Takes the graph with placeholders and one body per kind of block, leaves in it a copy of the body
for every placeholder, bound to the weights of the block that it stands for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import onnx_ir as ir

from .fold import PLACEHOLDER, Folded

SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node: the modules that it comes from
TEMPLATES = "templates."  # in front of the weights of Folded.templates


@dataclass
class Body:
    """The ONNX nodes of one kind of block, with the values that flow in and out."""

    inputs: list[ir.Value]
    output: ir.Value
    nodes: list[ir.Node]


def expand(model: ir.Model, folded: Folded, weights: dict[str, ir.Value]):
    """Replace every placeholder by a copy of its kind's nodes. `weights`: {name: graph input}.

    Afterwards the graph's inputs are the tower's own and its weights.
    """
    graph = model.graph
    own = graph.inputs[: folded.tower_inputs]
    bodies = _bodies(graph, folded)
    graph.outputs[:] = [graph.outputs[0]]
    placeholders = {node.op_type: node for node in graph if node.domain == PLACEHOLDER}
    for index, call in enumerate(folded.calls):
        template = f"{TEMPLATES}{call.kind}"
        _inline(placeholders[f"call{index}"], bodies[call.kind], call.path, template, weights)
    traced = []
    for body in bodies:
        traced += reversed(body.nodes)
    graph.remove(traced)
    graph.inputs[:] = [*own, *_tower_weights(weights)]
    model.opset_imports.pop(PLACEHOLDER, None)


def _tower_weights(weights: dict[str, ir.Value]) -> Iterator[ir.Value]:
    """The weights without those of the templates, renamed as in the tower."""
    for name, value in weights.items():
        if not name.startswith(TEMPLATES):
            value.name = name
            yield value


def _bodies(graph: ir.Graph, folded: Folded) -> list[Body]:
    """One per kind: their inputs follow the tower's, their outputs the tower's."""
    rest = iter(graph.inputs[folded.tower_inputs :])
    bodies = []
    for template_inputs, output in zip(folded.template_inputs, graph.outputs[1:]):
        inputs = list(islice(rest, len(template_inputs)))
        bodies.append(Body(inputs, output, _nodes_before(graph, output)))
    return bodies


def _nodes_before(graph: ir.Graph, output: ir.Value) -> list[ir.Node]:
    """The nodes that `output` is computed by, in the graph's order."""
    found = set()
    pending = [output.producer()]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [value.producer() for value in node.inputs if value is not None]
    return [node for node in graph if node in found]


def _inline(
    placeholder: ir.Node, body: Body, path: str, template: str, weights: dict[str, ir.Value]
):
    """Replace `placeholder` by a copy of the body.

    The copy has the weights of the module at `path` in place of those of `template`.
    """
    values = dict(zip(body.inputs, placeholder.inputs))
    for suffix, original in list(_below(weights, template)):
        name = path + suffix
        if name not in weights:
            weights[name] = ir.Value(name=name, shape=original.shape, type=original.type)
        values[original] = weights[name]
    for node in body.nodes:
        scopes = node.metadata_props.get(SCOPES, "[]").replace(template, path)
        copy = _copy(node, values, scopes)
        values.update(zip(node.outputs, copy.outputs))
        placeholder.prepend(copy)
    result = values[body.output]
    placeholder.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    placeholder.graph.remove(placeholder, safe=True)


def _below(weights: dict[str, ir.Value], path: str) -> Iterator[tuple[str, ir.Value]]:
    """(".mlp.up.weight" and the like, value) of the weights of the module at `path`."""
    for name, value in weights.items():
        if name.startswith(path + "."):
            yield name.removeprefix(path), value


def _copy(node: ir.Node, values: dict[ir.Value, ir.Value], scopes: str) -> ir.Node:
    """The same operator with new outputs; inputs that `values` maps are replaced."""
    return ir.Node(
        "",
        node.op_type,
        [values.get(value, value) for value in node.inputs],
        node.attributes.values(),
        outputs=[ir.Value(shape=value.shape, type=value.type) for value in node.outputs],
        metadata_props={SCOPES: scopes},
    )
