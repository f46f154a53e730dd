"""Outputs of a graph's nodes against the tower's modules."""

from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError

from .node import Node, measure

PIECE = 64 << 20  # bytes of weights in memory at a time


def compare_graph(family, folder: Path, pixels, work: Path, shapes: dict[str, tuple]) -> list[Node]:
    """Every ONNX node that ends a module against the recorded result."""
    import numpy as np

    from convert.verify.piecewise import StreamedGraph
    from runtime.common.progress import step_progress

    graph = StreamedGraph(folder, PIECE)
    nodes = ends_of_modules(graph.model.graph, shapes)
    if not nodes:
        raise ToolkitError(
            f"{folder} has no node that ends a module of {family.name}'s encoder; give the folder that "
            "python -m convert wrote for this model",
            CHECK_FAILED,
        )
    by_output = {node.output: node for node in nodes}
    with step_progress("ONNX", graph.steps) as graph.advance:
        for name, value in graph.values(pixels, list(by_output)):
            by_output[name].measures = measure(
                np.load(work / f"{by_output[name].golden}.npy"), value
            )
    return nodes


def ends_of_modules(graph, shapes: dict[str, tuple]) -> list[Node]:
    """Nodes are named `module path/operator`: the last one under a module's path gives its result, if it is its own."""
    last = {}
    known = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in (*graph.value_info, *graph.output)
    }
    for index, node in enumerate(graph.node):
        scope = node.name.rpartition("/")[0]
        own = next((path for path in (scope, f"tower.{scope}") if path in shapes), None)
        parts = (own or scope).split(".")
        for depth in range(1, len(parts) + 1):
            last[".".join(parts[:depth])] = Node(
                index, node.name, node.op_type, node.output[0], own
            )
    found = [node for path, node in last.items() if node.golden == path]
    for node in found:
        node.shape = known.get(node.output, ())
    return sorted((n for n in found if n.shape == shapes[n.golden]), key=lambda n: n.index)
