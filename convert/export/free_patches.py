"""Graphs for pictures of any size. Takes a graph that was traced with a fixed number of patches,
frees every dimension that holds it.

The number is one that no other dimension has, so it is found by its value. An encoder has it in
shapes only: in those of its values, and in the targets of Reshape, where it becomes -1.
"""

import math

import numpy as np
import onnx_ir as ir

from models.config import BLOCKS, MERGE, PATCHES
from runtime.common.errors import CHECK_FAILED, ToolkitError

TRACED_BLOCKS = 1009  # a prime number, above the widths of an attention head
SIZES = {PATCHES: MERGE**2 * TRACED_BLOCKS, BLOCKS: TRACED_BLOCKS}
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
    name = "shape_" + "_".join(str(size).replace("-", "m") for size in freed)
    if name not in graph.initializers:
        tensor = ir.tensor(freed.astype(np.int64), name=name)
        value = ir.Value(name=name, const_value=tensor)
        value.type = ir.TensorType(ir.DataType.INT64)
        value.shape = ir.Shape(tensor.shape)
        graph.register_initializer(value)
    node.replace_input_with(1, graph.initializers[name])


def _check_constants(node: ir.Node):
    for value in node.inputs:
        constant = None if value is None else value.const_value
        if constant is None or math.prod(constant.shape) > len(constant.shape) + 8:
            continue
        if constant.dtype == ir.DataType.INT64 and np.isin(constant.numpy(), list(NAMES)).any():
            raise _fixed(node)


def _fixed(node: ir.Node) -> ToolkitError:
    return ToolkitError(
        f"{node.name} fixes the number of patches; write that step of the model with other operators",
        CHECK_FAILED,
    )
