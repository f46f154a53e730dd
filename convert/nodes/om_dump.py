"""An .om's dump against its ONNX graph. Takes both and pixels, returns a comparison per operator.

The golden values are the graph's own, computed in fp32 by ONNX Runtime in pieces. An operator that
ATC fused carries the names of the nodes in it one after another, and gives the last one's result.
"""

from pathlib import Path

import numpy as np
import onnx

from convert.verify.streamed_graph import StreamedGraph
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.progress import step_progress

from .comparison import NodeComparison, measure
from .dump_files import DumpedOutput, in_file_names, load_values, read_dump
from .graph import PIECE_BYTES

MISSING = "no such operator in the dump (fused, or folded by ATC)"
OWN = "operator of the .om alone"


def compare_dump(
    artifact_dir: Path, dump_dir: Path, inputs: dict[str, np.ndarray]
) -> list[NodeComparison]:
    """The .om's own operators, then all nodes in the order of the graph, the output last.

    ToolkitError when nothing can be compared.
    """
    graph = StreamedGraph(artifact_dir, PIECE_BYTES)
    dumped = read_dump(dump_dir)
    pairs = match_outputs(graph.model.graph, dumped)
    nodes = _to_compare(graph.model.graph, pairs)
    by_output = {node.output: node for node in nodes if not node.reason}
    if not by_output:
        raise ToolkitError(
            f"no file in {dump_dir} is named after a node of {artifact_dir}/vision.onnx; give the dump of the "
            ".om that was made from it",
            CHECK_FAILED,
        )
    with step_progress("ONNX", graph.steps) as graph.advance:
        for name, value in graph.values(inputs, list(by_output)):
            _compare(by_output[name], pairs[name].path, value)
    if not any(node.measures for node in nodes):
        reason = next(iter(by_output.values())).reason
        raise ToolkitError(f"nothing was compared: {reason}", CHECK_FAILED)
    return _without_node(dumped, pairs) + nodes


def match_outputs(graph: onnx.GraphProto, dumped: list[DumpedOutput]) -> dict[str, DumpedOutput]:
    """{name of a float value in the graph: what the device computed for it}.

    Matched by the node's name, else by the end of the operator's name: a fused operator's last node.
    """
    outputs = _float_outputs(graph)
    longest_first = sorted(outputs, key=len, reverse=True)
    pairs = {}
    for file in dumped:
        if file.name in outputs:
            pairs[outputs[file.name]] = file
            continue
        fused = next((name for name in longest_first if file.name.endswith(name)), None)
        if fused:
            pairs.setdefault(outputs[fused], file)
    return pairs


def _float_outputs(graph: onnx.GraphProto) -> dict[str, str]:
    """{node's name as in file names: its first output}, of the outputs in float32."""
    floats = set()
    for value in (*graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            floats.add(value.name)
    outputs = {}
    for node in graph.node:
        if node.name and node.output[0] in floats:
            outputs[in_file_names(node.name)] = node.output[0]
    return outputs


def _to_compare(graph: onnx.GraphProto, pairs: dict[str, DumpedOutput]) -> list[NodeComparison]:
    """All nodes, without measures; those that the dump lacks have the reason MISSING."""
    nodes = []
    for index, node in enumerate(graph.node):
        output = node.output[0]
        compared = NodeComparison(index, "*", node.op_type, output, node.name, reason=MISSING)
        if output in pairs:
            file = pairs[output]
            compared.candidate = file.path.name
            compared.operator = file.operator or node.op_type
            compared.reason = ""
        nodes.append(compared)
    return nodes


def _compare(node: NodeComparison, path: Path, golden: np.ndarray):
    """Set the node's measures, or the reason why there are none."""
    value = load_values(path, golden.size)
    node.dtype = str(value.dtype)
    node.shape = golden.shape
    if value.size == golden.size:
        node.measures = measure(golden, value.reshape(golden.shape))
    else:
        node.reason = (
            f"{list(value.shape)} on the device, {list(golden.shape)} in the graph (msaccucmp.py convert -f ND "
            "unfolds a format of the device)"
        )


def _without_node(
    dumped: list[DumpedOutput], pairs: dict[str, DumpedOutput]
) -> list[NodeComparison]:
    """The operators that the .om has and the graph does not."""
    used = {file.path for file in pairs.values()}
    own = []
    for file in dumped:
        if file.path not in used:
            own.append(NodeComparison(-1, file.path.name, file.operator, "", "*", reason=OWN))
    return own
