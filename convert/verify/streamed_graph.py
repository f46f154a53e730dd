"""The ONNX side of the verification, with a part of the weights in memory at a time.

Takes a directory with vision.onnx, returns what ONNX Runtime computes. The graph is cut where few
values are alive; its pieces refer to the one data file and run one after another.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.files import native_path
from runtime.common.files import write_atomically
from runtime.vision.artifact import ONNX
from runtime.vision.onnx_session import session_options

FLOAT_BYTES = 4
PIECE_BYTES = 1 << 30  # of weights; a smaller graph stays whole
ACTIVATIONS = 4  # values of the largest size at a time: scores, softmax, and what the arena keeps
PIECE_FILE = "piece.onnx"
ALIVE = 2  # values that may cross a cut: a tower's and a Q-Former's residual stream


@dataclass
class Piece:
    """Consecutive nodes with the names of the values that they take and give."""

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]

    def read(self) -> set[str]:
        """Names of all values that its nodes read, weights among them."""
        return set().union(*(node.input for node in self.nodes))

    def computed_outputs(self) -> list[str]:
        """Names of the outputs that its nodes compute; the others only pass through it."""
        computed = self.computed()
        return [name for name in self.outputs if name in computed]

    def computed(self) -> set[str]:
        """Names of all values that its nodes compute."""
        return set().union(*(node.output for node in self.nodes))


class StreamedGraph:
    """vision.onnx of `onnx_dir` on the CPU, in `steps` pieces of about `limit` bytes of weights
    each.

    A piece lies as a file in `onnx_dir` while it runs. `advance()` is called after each.
    """

    def __init__(self, onnx_dir: Path, limit: int = PIECE_BYTES):
        self.onnx_dir = onnx_dir
        self.advance = lambda: None
        self.model = onnx.load(onnx_dir / ONNX, load_external_data=False)
        self.pieces = cut(self.model.graph, limit)
        self.steps = len(self.pieces)

    def run(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every image; a piece is loaded once for all of them."""
        graph = self.model.graph
        states = [{graph.input[0].name: array} for array in pixels]
        for piece in self.pieces:
            states = self._run(piece, states)
            self.advance()
        return [state[graph.output[0].name] for state in states]

    def values(self, pixels: np.ndarray, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, value) of these values inside the graph, piece by piece."""
        wanted = set(names)
        state = {self.model.graph.input[0].name: pixels}
        for piece in self.pieces:
            inner = wanted.intersection(piece.computed()).difference(piece.outputs)
            outputs = [*piece.outputs, *sorted(inner)]
            [state] = self._run(Piece(piece.nodes, piece.inputs, outputs), [state])
            for name in outputs:
                if name in wanted:
                    yield name, state[name]
            self.advance()

    def _run(self, piece: Piece, states: list[dict]) -> list[dict]:
        """{name: value} of the piece's outputs, for each {name: value} of its inputs."""
        import onnxruntime

        options = session_options()
        whole = self.steps == 1 and piece is self.pieces[0]
        path = self.onnx_dir / ONNX if whole else self._write(piece)
        results = []
        try:
            with native_path(path) as name:
                session = onnxruntime.InferenceSession(name, options, ["CPUExecutionProvider"])
            for state in states:
                results.append(_values(session, piece, state))
        finally:
            (self.onnx_dir / PIECE_FILE).unlink(missing_ok=True)
        return results

    def _write(self, piece: Piece) -> Path:
        read = piece.read()
        weights = [tensor for tensor in self.model.graph.initializer if tensor.name in read]
        graph = helper.make_graph(
            piece.nodes,
            "piece",
            _float_infos(piece.inputs),
            _float_infos(piece.computed_outputs()),
            weights,
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        path = self.onnx_dir / PIECE_FILE
        write_atomically(path, model.SerializeToString())
        return path


def _values(session, piece: Piece, state: dict) -> dict:
    """{name: value} of the piece's outputs, in memory of our own.

    ONNX Runtime (seen in 1.23; its PR #28088 ends it) gives an input that is an output too back as
    an array over the caller's buffer, which it does not keep alive: the values then change without
    an error. So it is not asked for what passes through, and what it gives is copied while
    everything still lives.
    """
    inputs = {name: state[name] for name in piece.inputs}
    computed = piece.computed_outputs()
    found = {name: state[name] for name in piece.outputs if name in state}
    for name, value in zip(computed, session.run(computed, inputs)):
        found[name] = np.array(value)
    return found


def _float_infos(names: list[str]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]


def memory_needed(onnx_dir: Path) -> int:
    """Bytes for a piece, whose weights ONNX Runtime holds twice (packed), and its activations."""
    graph = onnx.load(onnx_dir / ONNX, load_external_data=False).graph
    weights = sum(_weight_sizes(graph).values())
    largest = 0
    for value in graph.value_info:
        dims = value.type.tensor_type.shape.dim
        largest = max(largest, FLOAT_BYTES * math.prod(dim.dim_value for dim in dims))
    return 2 * min(weights, PIECE_BYTES) + ACTIVATIONS * largest


def _weight_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """{name: bytes} of the float32 weights."""
    sizes = {}
    for tensor in graph.initializer:
        sizes[tensor.name] = FLOAT_BYTES * math.prod(tensor.dims)
    return sizes


def cut(graph: onnx.GraphProto, limit: int) -> list[Piece]:
    """Pieces of about `limit` bytes of weights each, in order.

    A cut lies where at most ALIVE float values cross it.
    """
    sizes = _weight_sizes(graph)
    last_use = _last_uses(graph)
    pieces = []
    nodes = []
    held = 0
    alive = {graph.input[0].name}
    inputs = sorted(alive)
    for index, node in enumerate(graph.node):
        nodes.append(node)
        held += sum(sizes.get(name, 0) for name in node.input)
        alive = _still_used(alive.union(node.output), last_use, index)
        if held >= limit and 0 < len(alive) <= ALIVE:
            outputs = sorted(alive)
            pieces.append(Piece(nodes, inputs, outputs))
            nodes = []
            held = 0
            inputs = outputs
    pieces.append(Piece(nodes, inputs, [graph.output[0].name]))
    return pieces


def _last_uses(graph: onnx.GraphProto) -> dict[str, int]:
    """{value: index of the last node that reads it}."""
    last_use = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            last_use[name] = index
    return last_use


def _still_used(names: set[str], last_use: dict[str, int], index: int) -> set[str]:
    """Those that a node after `index` reads."""
    return {name for name in names if last_use.get(name, -1) > index}
