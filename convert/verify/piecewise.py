"""Both sides of the verification with a part of the weights in memory at a time, whatever the tower's size.

StreamedTower is the torch module whose blocks get their weights for the moment they run. StreamedGraph is vision.onnx cut
where few values are alive; its pieces refer to the one data file and run one after another. Both have `steps` and call
`advance` after each.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from models.checkpoint.reader import Checkpoint
from models.family import Family
from models.network.vision_blocks import repeated_lists
from runtime.vision.artifact import ONNX

PIECE_BYTES = 1 << 30  # of weights; a smaller graph stays whole
ACTIVATIONS = 4  # values of the largest size at a time: scores, softmax, and what the arena keeps
PIECE_FILE = "piece.onnx"
ALIVE = 2  # values that may cross a cut: a tower's and a Q-Former's residual stream


class StreamedTower:
    """The family's own tower in fp32 on the CPU, weights read from the checkpoint block by block."""

    def __init__(self, family: Family, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.rows = list(family.weights())
        self.advance = lambda: None
        with torch.device("meta"):
            self.tower = family.vision_encoder().eval().requires_grad_(False)
        blocks = {
            f"{path}.{index}": block
            for path in repeated_lists(self.tower)
            for index, block in enumerate(self.tower.get_submodule(path))
        }
        self.steps = len(blocks)
        prefixes = tuple(f"vision.{path}." for path in blocks)
        self._fill(
            self.tower,
            "vision.",
            [w for w in self.rows if not all(str(p.target).startswith(prefixes) for p in w.parts)],
        )
        for path, block in blocks.items():
            self._stream(block, f"vision.{path}.")

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, ...] as the family's VisionSpec says -> float32 [1, rows, hidden]."""
        with torch.inference_mode():
            return self.tower(torch.from_numpy(pixels)).numpy()

    def _stream(self, block, prefix):
        def emptied(*_):
            block.to("meta")
            self.advance()

        block.register_forward_pre_hook(lambda *_: self._fill(block, prefix, self.rows))
        block.register_forward_hook(emptied)

    def _fill(self, module, prefix, rows):
        values = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.checkpoint.assemble(rows, prefix, torch.float32)
        }
        module.load_state_dict(values, strict=False, assign=True)


@dataclass
class Piece:
    """Consecutive nodes with the names of the values that flow in and out."""

    nodes: list
    inputs: list[str]
    outputs: list[str]


class StreamedGraph:
    """vision.onnx of `folder` in ONNX Runtime on the CPU; a piece lies beside it while it runs."""

    def __init__(self, folder: Path, limit: int = PIECE_BYTES):
        self.folder = folder
        self.advance = lambda: None
        self.model = onnx.load(folder / ONNX, load_external_data=False)
        self.pieces = cut(self.model.graph, limit)
        self.steps = len(self.pieces)

    def run(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        """Features of every picture; a piece is loaded once for all of them."""
        graph = self.model.graph
        states = [{graph.input[0].name: array} for array in pixels]
        for piece in self.pieces:
            states = self._run(piece, states)
            self.advance()
        return [state[graph.output[0].name] for state in states]

    def values(self, pixels: np.ndarray, names: list[str]):
        """Yields (name, value) of these values inside the graph, on the way through it."""
        wanted = set(names)
        state = {self.model.graph.input[0].name: pixels}
        for piece in self.pieces:
            inner = [
                name
                for node in piece.nodes
                for name in node.output
                if name in wanted and name not in piece.outputs
            ]
            (state,) = self._run(Piece(piece.nodes, piece.inputs, piece.outputs + inner), [state])
            yield from ((name, state[name]) for name in state if name in wanted)
            self.advance()

    def _run(self, piece, states):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        whole = self.steps == 1 and piece is self.pieces[0]
        path = self.folder / ONNX if whole else self._write(piece)
        try:
            session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
            return [
                dict(
                    zip(
                        piece.outputs,
                        session.run(piece.outputs, {name: state[name] for name in piece.inputs}),
                    )
                )
                for state in states
            ]
        finally:
            (self.folder / PIECE_FILE).unlink(missing_ok=True)

    def _write(self, piece) -> Path:
        used = {name for node in piece.nodes for name in node.input}
        graph = helper.make_graph(
            piece.nodes,
            "piece",
            _infos(piece.inputs),
            _infos(piece.outputs),
            [tensor for tensor in self.model.graph.initializer if tensor.name in used],
        )
        path = self.folder / PIECE_FILE
        path.write_bytes(
            helper.make_model(
                graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
            ).SerializeToString()
        )
        return path


def memory_needed(folder: Path) -> int:
    """Bytes that one piece and the largest activations take in ONNX Runtime, which holds packed weights a second time."""
    graph = onnx.load(folder / ONNX, load_external_data=False).graph
    weights = sum(4 * math.prod(tensor.dims) for tensor in graph.initializer)
    largest = max(
        (
            4 * math.prod(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in graph.value_info
        ),
        default=0,
    )
    return 2 * min(weights, PIECE_BYTES) + ACTIVATIONS * largest


def _infos(names):
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]


def cut(graph: onnx.GraphProto, limit: int) -> list[Piece]:
    """Pieces of about `limit` bytes of weights each, in order; only float values that the next piece needs cross a cut."""
    sizes = {tensor.name: 4 * math.prod(tensor.dims) for tensor in graph.initializer}
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    alive = {graph.input[0].name}
    pieces = []
    start = 0
    held = 0
    entering = set(alive)
    for index, node in enumerate(graph.node):
        held += sum(sizes.get(name, 0) for name in node.input)
        alive = {name for name in alive | set(node.output) if last.get(name, -1) > index}
        if held >= limit and 0 < len(alive) <= ALIVE:
            pieces.append(
                Piece(list(graph.node[start : index + 1]), sorted(entering), sorted(alive))
            )
            start = index + 1
            held = 0
            entering = set(alive)
    return [*pieces, Piece(list(graph.node[start:]), sorted(entering), [graph.output[0].name])]
