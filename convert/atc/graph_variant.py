"""The graph for ATC where it must differ from vision.onnx: a free batch, or AIPP at the input.

Takes vision.onnx, writes vision_atc.onnx beside it, with the same weights in the same
vision.onnx.data. Free batch (for --dynamic-batch): no constant may hold the batch size 1.
AIPP: the input becomes the normalised image as NCHW, because AIPP stands in front of an NCHW input
and does the arithmetic of `Normalize`; the .om's own input is the raw image, uint8 NHWC.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from convert.export.constants import whole_numbers
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.vision.artifact import ONNX

from .aipp import normalization
from .command import OmRequest

BATCH = "batch"


def write_variant(family: Family, artifact_dir: Path, request: OmRequest, path: Path):
    """Write the graph as `request` needs it to `path`, a file in the artifact.

    ToolkitError (exit 1) if the graph cannot be changed so.
    """
    model = ir.load(artifact_dir / ONNX)
    if request.aipp:
        cut_normalize(model.graph, family)
    if request.gears:
        free_batch(model.graph)
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()):
            del model.graph.initializers[name]
    ir.save(model, path)


def cut_normalize(graph: ir.Graph, family: Family):
    """Remove the nodes of `Normalize`; their result [batch, 3, H, W] becomes the graph's input."""
    path, _ = normalization(family)
    nodes = [node for node in graph if node.name.startswith(path + "/")]
    batch, height, width, channels = family.vision.input_shape
    raw = graph.inputs[0]
    normalised = ir.Value(
        name=family.vision.input_name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape((batch, channels, height, width)),
    )
    nodes[-1].outputs[0].replace_all_uses_with(normalised)
    graph.inputs[:] = [normalised]
    graph.remove(nodes, safe=True)
    if list(raw.uses()):
        raise ToolkitError(
            "--aipp does not fit this graph: it reads the raw picture elsewhere too", CHECK_FAILED
        )


def free_batch(graph: ir.Graph):
    """Free the first dimension of input and output; ToolkitError where an operator forbids it."""
    image = graph.inputs[0]
    batched = _follow_batch(graph, image)
    if graph.outputs[0] not in batched:
        raise ToolkitError(
            "--dynamic-batch does not fit this graph: its output ignores the picture", CHECK_FAILED
        )
    for node in graph:
        for value in node.outputs:
            if value in batched and value.shape is not None:
                value.shape = _with_free_batch(value.shape)
    image.shape = _with_free_batch(image.shape)


def _follow_batch(graph: ir.Graph, image: ir.Value) -> set[ir.Value]:
    """All values that depend on `image`; on the way, nodes that fix the batch size are replaced."""
    batched = {image}
    for node in list(graph):
        if batched.isdisjoint(node.inputs):
            continue
        batched.update(node.outputs)
        if node.op_type == "Reshape":
            _free_reshape(graph, node)
        elif node.op_type == "Concat" and not batched.issuperset(node.inputs):
            _concat_by_adding(graph, node, batched)
        elif _touches_batch(node):
            raise ToolkitError(
                f"--dynamic-batch does not fit this graph: {node.name} fixes the batch",
                CHECK_FAILED,
            )
    return batched


def _with_free_batch(shape: ir.Shape) -> ir.Shape:
    return ir.Shape((BATCH, *shape[1:]))


def _touches_batch(node: ir.Node) -> bool:
    if node.op_type == "Transpose":
        return node.attributes["perm"].as_ints()[0] != 0
    if node.op_type == "Slice":
        axes = node.inputs[3].const_value.numpy().tolist()
        rank = len(node.inputs[0].shape)
        return 0 in axes or -rank in axes
    return node.op_type in ("Expand", "Gather", "Squeeze", "Unsqueeze")


def _free_reshape(graph: ir.Graph, node: ir.Node):
    target = node.inputs[1].const_value.numpy()
    if target[0] != 1:
        raise ToolkitError(
            f"--dynamic-batch does not fit this graph: {node.name} mixes the batch into {list(target)}",
            CHECK_FAILED,
        )
    node.replace_input_with(1, whole_numbers(graph, np.concatenate([[-1], target[1:]])))


def _concat_by_adding(graph: ir.Graph, node: ir.Node, batched: set[ir.Value]):
    """Replace a Concat of rows with and without a batch by the sum of its inputs, each padded with
    zeros to the full length: a sum broadcasts over the batch, and needs no arithmetic on shapes.
    """
    total = None
    for index, value in enumerate(node.inputs):
        padded = _insert_pad(graph, node, index)
        if value in batched:
            batched.add(padded)
        if total is None:
            total = padded
        else:
            total = _insert(node, "Add", [total, padded], f"{node.name}/Add_{index}")
        total.shape = node.outputs[0].shape
        batched.add(total)
    node.outputs[0].replace_all_uses_with(total, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _insert_pad(graph: ir.Graph, concat: ir.Node, index: int) -> ir.Value:
    """Input `index` of a Concat, padded with zeros to where it lies in the result."""
    axis = concat.attributes["axis"].as_int()
    sizes = [value.shape[axis] for value in concat.inputs]
    pads = np.zeros((2, len(concat.outputs[0].shape)), np.int64)
    pads[:, axis] = sum(sizes[:index]), sum(sizes[index + 1 :])
    inputs = [concat.inputs[index], whole_numbers(graph, pads.ravel())]
    return _insert(concat, "Pad", inputs, f"{concat.name}/Pad_{index}")


def _insert(before: ir.Node, op_type: str, inputs: list[ir.Value], name: str) -> ir.Value:
    node = ir.Node("", op_type, inputs, name=name)
    node.outputs[0].name = f"{name}_output_0"
    node.outputs[0].type = inputs[0].type
    before.prepend(node)
    return node.outputs[0]
