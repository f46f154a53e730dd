"""The pieces in which a graph is verified.

Takes an ONNX graph, returns its nodes in consecutive Pieces, each with a part of the weights. A
large attention is a piece of its own that can be computed for some of its queries at a time.
"""

import math
from dataclasses import dataclass

import onnx

FLOAT_BYTES = 4
PIECE_BYTES = 128 << 20  # of weights; a piece may have up to twice as many
SCORE_BYTES = 256 << 20  # of attention scores
ACTIVATIONS = 4  # values of the largest size at a time; measured: 3, and a library's own memory


@dataclass
class Piece:
    """Consecutive nodes with the names of the values that they take and give.

    queries: the input of an attention, [..., rows, head_dim], of which `rows` rows are computed at
    a time; all that its nodes compute has these rows as its last axis but one. None: the piece is
    computed at once.
    """

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    queries: str | None = None
    rows: int = 0

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


@dataclass
class _Attention:
    """softmax(queries @ keys) @ values as three nodes."""

    nodes: list[onnx.NodeProto]
    row_bytes: int  # of the scores of one query

    @property
    def queries(self) -> str:
        return self.nodes[0].input[0]

    @property
    def rows(self) -> int:
        return max(1, SCORE_BYTES // self.row_bytes)


def cut(graph: onnx.GraphProto, limit: int) -> list[Piece]:
    """Pieces of about `limit` bytes of weights each, in an order in which they can be computed.

    A cut lies where few float values cross it (as many as the graph has inputs, and one more), and
    around every large attention.
    """
    sizes = weight_sizes(graph)
    large = {attention.nodes[0].output[0]: attention for attention in _large_attentions(graph)}
    nodes = _scores_last(graph, large)
    last_use = _last_uses(nodes)
    alive = {value.name for value in graph.input}
    most_alive = len(alive) + 1  # a Q-Former's residual stream beside a tower's; or the geometry
    pieces = []
    piece = Piece([], sorted(alive), [])
    held = 0
    left = 0  # nodes of the attention that is being collected
    for index, node in enumerate(nodes):
        attention = large.get(node.output[0])
        if attention:
            piece = _next_piece(pieces, piece, alive)
            piece.queries = attention.queries
            piece.rows = attention.rows
            left = len(attention.nodes)
        piece.nodes.append(node)
        held += sum(sizes.get(name, 0) for name in node.input)
        alive = _still_used(alive.union(node.output), last_use, index)
        left -= 1
        if left == 0 or (left < 0 and held >= limit and 0 < len(alive) <= most_alive):
            piece = _next_piece(pieces, piece, alive)
            held = 0
    piece.outputs = [graph.output[0].name]
    return [*pieces, piece]


def _next_piece(pieces: list[Piece], piece: Piece, alive: set[str]) -> Piece:
    """The one behind `piece`, which is complete and goes to `pieces` if it has any nodes."""
    if piece.nodes:
        piece.outputs = sorted(alive)
        pieces.append(piece)
    return Piece([], sorted(alive), [])


def weight_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """{name: bytes} of the float32 weights."""
    sizes = {}
    for tensor in graph.initializer:
        sizes[tensor.name] = FLOAT_BYTES * math.prod(tensor.dims)
    return sizes


def memory_needed(graph: onnx.GraphProto) -> int:
    """Bytes for a piece's weights and its activations."""
    weights = sum(weight_sizes(graph).values())
    scores = {}
    for attention in _large_attentions(graph):
        for node in attention.nodes[:2]:
            scores[node.output[0]] = SCORE_BYTES
    largest = 0
    for name, size in _value_sizes(graph).items():
        largest = max(largest, scores.get(name, size))
    return 2 * min(weights, PIECE_BYTES) + ACTIVATIONS * largest


def _large_attentions(graph: onnx.GraphProto) -> list[_Attention]:
    """Those whose scores exceed SCORE_BYTES, recognised by MatMul -> Softmax -> MatMul."""
    producers = {node.output[0]: node for node in graph.node}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    shapes = _shapes(graph)
    found = []
    for softmax in graph.node:
        if softmax.op_type != "Softmax":
            continue
        scores = producers.get(softmax.input[0])
        mixing = readers.get(softmax.output[0], [])
        shape = shapes.get(softmax.input[0], ())
        nodes = [scores, softmax, *mixing]
        if [node and node.op_type for node in nodes] != ["MatMul", "Softmax", "MatMul"]:
            continue
        score_bytes = FLOAT_BYTES * math.prod(shape)
        if score_bytes > SCORE_BYTES:
            found.append(_Attention(nodes, score_bytes // shape[-2]))
    return found


def _scores_last(graph: onnx.GraphProto, large: dict[str, _Attention]) -> list[onnx.NodeProto]:
    """The graph's nodes; those of a large attention stand together where its last one stands."""
    early = set()
    chains = {}
    for attention in large.values():
        early.update(node.output[0] for node in attention.nodes[:-1])
        chains[attention.nodes[-1].output[0]] = attention.nodes
    nodes = []
    for node in graph.node:
        if node.output[0] not in early:
            nodes += chains.get(node.output[0], [node])
    return nodes


def _value_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    """{name: bytes} of the float32 values inside."""
    return {name: FLOAT_BYTES * math.prod(shape) for name, shape in _shapes(graph).items()}


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple]:
    shapes = {}
    for value in graph.value_info:
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _last_uses(nodes: list[onnx.NodeProto]) -> dict[str, int]:
    """{value: index of the last node that reads it}."""
    last_use = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            last_use[name] = index
    return last_use


def _still_used(names: set[str], last_use: dict[str, int], index: int) -> set[str]:
    """Those that a node after `index` reads."""
    return {name for name in names if last_use.get(name, -1) > index}
