"""The ONNX side of the verification, with a part of the weights in memory at a time.

Takes a directory with vision.onnx, returns what ONNX Runtime computes. The graph's pieces refer to
the one data file and run one after another.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.files import native_path
from runtime.common.files import write_atomically
from runtime.vision.artifact import ONNX
from runtime.vision.onnx_session import session_options

from .pieces import PIECE_BYTES, Piece, cut

PIECE_FILE = "piece.onnx"


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

    def run(self, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        """Features for each {name: array} of the graph's inputs; a piece is loaded once for all."""
        graph = self.model.graph
        states = [dict(arrays) for arrays in inputs]
        for piece in self.pieces:
            states = self._run(piece, states)
            self.advance()
        return [state[graph.output[0].name] for state in states]

    def values(
        self, inputs: dict[str, np.ndarray], names: list[str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, value) of these values inside the graph, piece by piece."""
        wanted = set(names)
        state = dict(inputs)
        for piece in self.pieces:
            inner = wanted.intersection(piece.computed()).difference(piece.outputs)
            outputs = [*piece.outputs, *sorted(inner)]
            [state] = self._run(replace(piece, outputs=outputs), [state])
            for name in outputs:
                if name in wanted:
                    yield name, state[name]
            self.advance()

    def _run(self, piece: Piece, states: list[dict]) -> list[dict]:
        """{name: value} of the piece's outputs, for each {name: value} of its inputs."""
        import onnxruntime

        options = session_options()
        options.enable_cpu_mem_arena = False  # it would keep what the piece no longer needs
        options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy
        whole = self.steps == 1 and piece is self.pieces[0]
        path = self.onnx_dir / ONNX if whole else self._write(piece)
        results = []
        try:
            with native_path(path) as name:
                session = onnxruntime.InferenceSession(name, options, ["CPUExecutionProvider"])
            for state in states:
                results.append(_values_in_slices(session, piece, state))
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


def _values_in_slices(session, piece: Piece, state: dict) -> dict:
    """`_values`, of an attention for some of its queries at a time."""
    if piece.queries is None:
        return _values(session, piece, state)
    queries = state[piece.queries]
    slices = []
    for start in range(0, queries.shape[-2], piece.rows):
        rows = queries[..., start : start + piece.rows, :]
        slices.append(_values(session, piece, {**state, piece.queries: rows}))
    found = {name: state[name] for name in piece.outputs if name in state}
    for name in piece.computed_outputs():
        found[name] = np.concatenate([each[name] for each in slices], axis=-2)
    return found


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
