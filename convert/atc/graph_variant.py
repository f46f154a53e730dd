"""The graph for ATC where it must differ from vision.onnx: a batch of any size, and AIPP's input.

In flows vision.onnx, out flows vision_atc.onnx beside it, with the same weights in the same vision.onnx.data. Free batch
(for --dynamic-batch): no constant may hold the batch size 1 any more. AIPP: the picture arrives as normalised NCHW,
because AIPP works in front of a graph's NCHW input and has done the arithmetic of `Normalize` then; the .om's own input
is the raw picture, uint8 NHWC.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from models.family import Family
from models.network.vision_blocks import Normalize
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.vision.artifact import ONNX

from .command import Request

MAX_SIDE = 4096  # of AIPP's source picture
BATCH = "batch"


def write(family: Family, folder: Path, request: Request, path: Path):
    """The graph as `request` needs it, at `path` in `folder`; ToolkitError (exit 1) if the graph does not allow it."""
    model = ir.load(folder / ONNX)
    if request.aipp:
        cut_normalize(model.graph, family)
    if request.gears:
        free_batch(model.graph)
    for name in [
        name for name, value in model.graph.initializers.items() if not list(value.uses())
    ]:
        del model.graph.initializers[name]
    ir.save(model, path)


def normalization(family: Family) -> tuple[str, Normalize]:
    """(path, module) of the tower's only Normalize; ToolkitError if AIPP cannot stand in for it."""
    import torch

    with torch.device("meta"):
        found = [
            (n, m) for n, m in family.vision_encoder().named_modules() if isinstance(m, Normalize)
        ]
    side = max(family.vision.input_shape[1:3])
    if len(found) != 1 or side > MAX_SIDE:
        raise ToolkitError(
            f"--aipp does not fit {family.name}: it needs one normalisation at the input and pictures "
            f"of up to {MAX_SIDE} pixels, there are {len(found)} and {side}; leave --aipp out"
        )
    return found[0]


def aipp_config(family: Family) -> str:
    """AIPP file: uint8 RGB NHWC in, (x - mean - min) * var_reci per channel out, as NCHW.

    The mean is split into a whole number and a rest, because AIPP holds the rest in fp16: 122 + 0.7709 is exact to
    0.0005, 122.7709 only to 0.06.
    """
    _, height, width, _ = family.vision.input_shape
    _, module = normalization(family)
    lines = [
        "aipp_mode: static",
        "related_input_rank: 0",
        "input_format: RGB888_U8",
        f"src_image_size_w: {width}",
        f"src_image_size_h: {height}",
        "crop: false",
        "padding: false",
        "csc_switch: false",
        "rbuv_swap_switch: false",
    ]
    for channel, (mean, std) in enumerate(zip(module.mean, module.std)):
        whole, rest = divmod(255 * mean, 1)
        lines += [
            f"mean_chn_{channel}: {int(whole)}",
            f"min_chn_{channel}: {rest:.8g}",
            f"var_reci_chn_{channel}: {1 / (255 * std):.8g}",
        ]
    return "aipp_op {\n" + "".join(f"    {line}\n" for line in lines) + "}\n"


def apply_aipp(config: str, pixels: np.ndarray, dtype=np.float32) -> np.ndarray:
    """What AIPP makes of raw NHWC pixels (whole numbers), computed in `dtype` with the numbers of its file: NCHW."""
    values = dict(line.strip().split(": ") for line in config.splitlines() if ": " in line)
    mean, rest, scale = (
        np.array([values[f"{name}_chn_{c}"] for c in range(3)], np.float64).astype(dtype)
        for name in ("mean", "min", "var_reci")
    )
    return np.ascontiguousarray(
        ((pixels.astype(dtype) - mean - rest) * scale).transpose(0, 3, 1, 2)
    )


def cut_normalize(graph: ir.Graph, family: Family):
    """Remove the nodes of `Normalize`; their result becomes the graph's input."""
    path, _ = normalization(family)
    nodes = [node for node in graph if node.name.startswith(path + "/")]
    batch, height, width, channels = family.vision.input_shape
    old = graph.inputs[0]
    new = ir.Value(
        name=family.vision.input_name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape((batch, channels, height, width)),
    )
    nodes[-1].outputs[0].replace_all_uses_with(new)
    graph.inputs[:] = [new]
    graph.remove(nodes, safe=True)
    if list(old.uses()):
        raise ToolkitError(
            "--aipp does not fit this graph: it reads the raw picture elsewhere too", CHECK_FAILED
        )


def free_batch(graph: ir.Graph):
    """Let the first dimension of input and output be of any size; ToolkitError where an operator forbids it."""
    picture = graph.inputs[0]
    batched = {picture}
    for node in list(graph):
        if batched.isdisjoint(node.inputs):
            continue
        batched.update(node.outputs)
        if node.op_type == "Reshape":
            _free_reshape(graph, node)
        elif node.op_type == "Concat" and not batched.issuperset(node.inputs):
            _sum_of_pads(graph, node, batched)
        elif _touches_batch(node):
            raise ToolkitError(
                f"--dynamic-batch does not fit this graph: {node.name} fixes the batch",
                CHECK_FAILED,
            )
    if graph.outputs[0] not in batched:
        raise ToolkitError(
            "--dynamic-batch does not fit this graph: its output ignores the picture", CHECK_FAILED
        )
    for value in (v for node in graph for v in node.outputs):
        if value in batched and value.shape is not None:
            value.shape = ir.Shape((BATCH, *value.shape[1:]))
    picture.shape = ir.Shape((BATCH, *picture.shape[1:]))


def _touches_batch(node: ir.Node) -> bool:
    if node.op_type == "Transpose":
        return node.attributes["perm"].as_ints()[0] != 0
    if node.op_type == "Slice":
        return bool(
            {0, -len(node.inputs[0].shape)}.intersection(
                node.inputs[3].const_value.numpy().tolist()
            )
        )
    return node.op_type in ("Expand", "Gather", "Squeeze", "Unsqueeze")


def _free_reshape(graph, node):
    target = node.inputs[1].const_value.numpy()
    if target[0] != 1:
        raise ToolkitError(
            f"--dynamic-batch does not fit this graph: {node.name} mixes the batch into {list(target)}",
            CHECK_FAILED,
        )
    node.replace_input_with(1, _constant(graph, np.concatenate([[-1], target[1:]])))


def _sum_of_pads(graph, node, batched):
    """Concat of rows with and without a batch -> sum of the parts, each filled up with zeros: it broadcasts, and needs
    no arithmetic on shapes."""
    axis = node.attributes["axis"].as_int()
    rank = len(node.outputs[0].shape)
    sizes = [value.shape[axis] for value in node.inputs]
    total = None
    for index, value in enumerate(node.inputs):
        pads = np.zeros((2, rank), np.int64)
        pads[:, axis] = sum(sizes[:index]), sum(sizes[index + 1 :])
        padded = _insert(
            node, "Pad", [value, _constant(graph, pads.ravel())], f"{node.name}/Pad_{index}"
        )
        total = (
            padded
            if total is None
            else _insert(node, "Add", [total, padded], f"{node.name}/Add_{index}")
        )
        total.shape = node.outputs[0].shape
        batched.update({total, padded} if value in batched else {total})
    node.outputs[0].replace_all_uses_with(total, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _insert(before, op_type, inputs, name) -> ir.Value:
    node = ir.Node("", op_type, inputs, name=name)
    node.outputs[0].name = f"{name}_output_0"
    node.outputs[0].type = inputs[0].type
    before.prepend(node)
    return node.outputs[0]


def _constant(graph, values: np.ndarray) -> ir.Value:
    tensor = ir.tensor(values.astype(np.int64))
    name = "free_" + "_".join(str(v).replace("-", "m") for v in values)
    if name not in graph.initializers:
        graph.register_initializer(
            ir.Value(
                name=name,
                const_value=tensor,
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape(tensor.shape),
            )
        )
    return graph.initializers[name]
