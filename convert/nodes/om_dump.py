"""The dump of an .om against its ONNX graph, operator by operator, under msit's limits.

The device writes one file per operator, `type.name.task.stream.timestamp` (some CANN versions have fewer or more numbers);
`msaccucmp.py convert` makes of it `….output.index[.shape].npy` or `.bin`. In names, `/`, `.` and blanks have become `_`. The
golden values are the graph's own, computed in fp32 by ONNX Runtime in pieces. An operator that ATC fused carries the names
of what is in it one after another, and gives the last one's result.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError

from .node import Node, measure

CONVERTED = re.compile(
    r"(?P<type>[\w-]+)\.(?P<name>[\w-]+)\.(?P<numbers>[\d.]+)\.output\.(?P<index>\d+)"
    r"(\.\d+(x\d+)*)?\.(npy|bin)"
)
GOLDEN = re.compile(
    r"(?P<name>[\w-]+)\.(?P<index>\d+)\.(?P<numbers>\d{10,})\.npy"
)  # as msit dumps an ONNX graph
RAW = re.compile(r"[\w-]+\.[\w-]+(\.\d+)+")
FLOATS = {2: "float16", 4: "float32", 8: "float64"}  # of a .bin, by the bytes of an element
MISSING = "no such operator in the dump (fused, or folded by ATC)"
OWN = "operator of the .om alone"
FLOAT = 1  # onnx.TensorProto


@dataclass
class Dumped:
    """One output of an operator on the device. time: the largest number of the file's name."""

    name: str
    type: str
    time: int
    path: Path


def compare_dump(folder: Path, dump: Path, pixels) -> list[Node]:
    """The .om's own operators, then all nodes in the order of the graph, the output last."""
    from convert.verify.piecewise import StreamedGraph
    from runtime.common.progress import step_progress

    from .graph import PIECE

    graph = StreamedGraph(folder, PIECE)
    dumped = read_dump(dump)
    pairs = matched(graph.model.graph, dumped)
    nodes = [node_of(index, node, pairs) for index, node in enumerate(graph.model.graph.node)]
    by_output = {node.output: node for node in nodes if not node.reason}
    if not by_output:
        raise ToolkitError(
            f"no file in {dump} is named after a node of {folder}/vision.onnx; give the dump of the .om that "
            "was made from it",
            CHECK_FAILED,
        )
    with step_progress("ONNX", graph.steps) as graph.advance:
        for name, value in graph.values(pixels, list(by_output)):
            fill(by_output[name], pairs[name].path, value)
    if not any(node.measures for node in nodes):
        raise ToolkitError(
            f"nothing was compared: {next(iter(by_output.values())).reason}", CHECK_FAILED
        )
    used = {id(file) for file in pairs.values()}
    return [
        Node(-1, file.path.name, file.type, "", "*", reason=OWN)
        for file in dumped
        if id(file) not in used
    ] + nodes


def read_dump(folder: Path) -> list[Dumped]:
    """The first output of every operator, of its last run, from all folders below; inputs are left out."""
    found = {}
    raw = None
    for path in sorted(folder.rglob("*")):
        raw = path if RAW.fullmatch(path.name) and path.is_file() else raw
        named = CONVERTED.fullmatch(path.name) or GOLDEN.fullmatch(path.name)
        if named and int(named["index"]) == 0:
            entry = Dumped(
                named["name"],
                named.groupdict().get("type", ""),
                max(map(int, named["numbers"].split("."))),
                path,
            )
            found[entry.name] = max(entry, found.get(entry.name, entry), key=lambda e: e.time)
    if not found and raw:
        raise ToolkitError(
            f"{raw} is as the device wrote it; make npy files with `python3 $ASCEND_TOOLKIT_HOME/tools/"
            f"operator_cmp/compare/msaccucmp.py convert -d {raw.parent} -out NEW` and give --dump NEW"
        )
    if not found:
        raise ToolkitError(
            f"--dump {folder} has no file like TYPE.NAME.TASK.STREAM.TIMESTAMP.output.0.npy; give the folder "
            "that msaccucmp.py convert wrote"
        )
    return list(found.values())


def in_file_names(name: str) -> str:
    return re.sub(r"[./\\ ]", "_", name)


def matched(graph, dumped: list[Dumped]) -> dict[str, Dumped]:
    """Value's name in the graph -> what the device computed for it: by the node's name, or by the name's end, which is the
    last node of a fused operator."""
    floats = {
        v.name for v in (*graph.value_info, *graph.output) if v.type.tensor_type.elem_type == FLOAT
    }
    nodes = {
        in_file_names(node.name): node
        for node in graph.node
        if node.name and node.output[0] in floats
    }
    names = sorted(nodes, key=len, reverse=True)
    pairs = {}
    for file in dumped:
        name = (
            file.name
            if file.name in nodes
            else next((n for n in names if file.name.endswith(n)), None)
        )
        if name and (file.name == name or nodes[name].output[0] not in pairs):
            pairs[nodes[name].output[0]] = file
    return pairs


def node_of(index: int, node, pairs: dict[str, Dumped]) -> Node:
    file = pairs.get(node.output[0])
    return Node(
        index,
        file.path.name if file else "*",
        file.type or node.op_type if file else node.op_type,
        node.output[0],
        node.name,
        reason="" if file else MISSING,
    )


def fill(node: Node, path: Path, golden):
    """The node's measures, or the reason why there are none."""
    import numpy as np

    if path.suffix == ".npy":
        value = np.load(path, allow_pickle=False)
    else:
        size = path.stat().st_size
        value = np.fromfile(path, FLOATS.get(size // max(golden.size, 1), "uint8"))
    node.dtype = str(value.dtype)
    node.shape = golden.shape
    if value.size != golden.size:
        node.reason = (
            f"{list(value.shape)} on the device, {list(golden.shape)} in the graph (msaccucmp.py convert -f ND "
            "unfolds a format of the device)"
        )
    else:
        node.measures = measure(golden, value.reshape(golden.shape))
