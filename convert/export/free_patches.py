"""Graphs for pictures of any size. Takes a graph that was traced with a fixed number of patches,
frees every dimension that holds it.

The number is one that no other dimension has, so it is found by its value. An encoder has it in
shapes only: in those of its values, and in the targets of Reshape, where it becomes -1.
"""

import numpy as np
import onnx_ir as ir

from models.config import BLOCK_PATCHES, BLOCKS, PATCHES
from runtime.common.errors import CHECK_FAILED, ToolkitError

from .constants import whole_numbers

TRACED_BLOCKS = 1009  # a prime number, above the widths of an attention head
SIZES = {PATCHES: BLOCK_PATCHES * TRACED_BLOCKS, BLOCKS: TRACED_BLOCKS}
NAMES = {size: name for name, size in SIZES.items()}


def traced_shape(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    """The shape with the number that is traced in place of each free dimension."""
    return tuple(SIZES.get(size, size) for size in shape)


def free_patches(graph: ir.Graph):
    """ToolkitError (exit 1) where an operator other than Reshape holds the number of patches."""
    for value in (*graph.inputs, *_results(graph)):
        if value.shape is not None:
            value.shape = ir.Shape([NAMES.get(size, size) for size in value.shape])
    for node in list(graph):
        if node.op_type == "Reshape":
            _free_target(graph, node)
        else:
            _check_constants(node)


def _results(graph: ir.Graph):
    for node in graph:
        yield from node.outputs


def _free_target(graph: ir.Graph, node: ir.Node):
    target = node.inputs[1].const_value.numpy()
    freed = np.where(np.isin(target, list(NAMES)), -1, target)
    if np.count_nonzero(freed == -1) > 1:
        raise _fixed(node)
    node.replace_input_with(1, whole_numbers(graph, freed))


def _check_constants(node: ir.Node):
    """Shapes and indices are the only whole numbers of a graph."""
    for value in node.inputs:
        constant = None if value is None else value.const_value
        if constant is None or constant.dtype != ir.DataType.INT64:
            continue
        if np.isin(constant.numpy(), list(NAMES)).any():
            raise _fixed(node)


def _fixed(node: ir.Node) -> ToolkitError:
    return ToolkitError(
        f"{node.name} fixes the number of patches; write that step of the model with other operators",
        CHECK_FAILED,
    )
