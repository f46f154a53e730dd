"""An exported graph against the tower. Takes the recorded results of the tower's modules, returns a
comparison for every ONNX node that ends a module.
"""

from pathlib import Path

import numpy as np
import onnx

from convert.verify.streamed_graph import StreamedGraph
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.progress import step_progress

from .comparison import NodeComparison, measure

FREE = 0  # what ONNX gives as the size of a dimension that has a name
PIECE_BYTES = 64 << 20  # of weights in memory at a time


def compare_graph(
    family: Family,
    artifact_dir: Path,
    inputs: dict[str, np.ndarray],
    work_dir: Path,
    shapes: dict[str, tuple],
) -> list[NodeComparison]:
    """`shapes`: {module path: shape} of the results that `work_dir` holds. ToolkitError if no node
    ends a module.
    """
    graph = StreamedGraph(artifact_dir, PIECE_BYTES)
    nodes = ends_of_modules(graph.model.graph, shapes)
    if not nodes:
        raise ToolkitError(
            f"{artifact_dir} has no node that ends a module of {family.name}'s encoder; give the folder that "
            "python -m convert wrote for this model",
            CHECK_FAILED,
        )
    by_output = {node.output: node for node in nodes}
    with step_progress("ONNX", graph.steps) as graph.advance:
        for name, value in graph.values(inputs, list(by_output)):
            node = by_output[name]
            node.measures = measure(np.load(work_dir / f"{node.golden}.npy"), value)
    return nodes


def ends_of_modules(graph: onnx.GraphProto, shapes: dict[str, tuple]) -> list[NodeComparison]:
    """Nodes are named `module path/operator`. The last node below a module's path computes the
    module's result, provided that it is the module's own and has the result's shape. In the order
    of the graph.
    """
    last = {}
    for index, node in enumerate(graph.node):
        scope = node.name.rpartition("/")[0]
        own = _module_path(scope, shapes)
        compared = NodeComparison(index, node.name, node.op_type, node.output[0], own)
        for path in _path_and_parents(own or scope):
            last[path] = compared
    known = _static_shapes(graph)
    ends = []
    for path, node in last.items():
        node.shape = known.get(node.output, ())
        if node.golden == path and _fits(node.shape, shapes[path]):
            node.shape = shapes[path]
            ends.append(node)
    return sorted(ends, key=lambda node: node.index)


def _module_path(scope: str, shapes: dict[str, tuple]) -> str | None:
    """The recorded module of a node's scope; the export leaves out an outer "tower."."""
    for path in (scope, f"tower.{scope}"):
        if path in shapes:
            return path
    return None


def _path_and_parents(path: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b", "a.b.c"]"""
    parts = path.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _fits(declared: tuple, found: tuple) -> bool:
    """Whether a value of the shape `found` may be that of a node; FREE dimensions take any size."""
    if len(declared) != len(found):
        return False
    return all(size in (FREE, actual) for size, actual in zip(declared, found))


def _static_shapes(graph: onnx.GraphProto) -> dict[str, tuple]:
    """{value: shape}, FREE where a dimension is."""
    shapes = {}
    for value in (*graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes
