"""How long a decoder's step takes on an Ascend chip.

Takes a chip, a split decoder and the bytes of its weights, returns seconds: the larger of
arithmetic and memory time, plus kernel launches and, over several devices, their sums. Nothing of
this was measured by us. Every parameter is named and says where it comes from; docs/plan.md sets
the results beside the figures that others published. Images are not in it: their encoder is another
program.
"""

from models.config import DecoderConfig
from runtime.ascend.chips import Chip
from runtime.parallel.split import Split

COMPUTE_EFFICIENCY = 0.6  # of the peak, long prompts; Huawei's msmodeling starts from 0.7
MATRIX_LAUNCH = 5e-6  # seconds on the device per matmul or attention kernel (msmodeling's cost)
VECTOR_LAUNCH = 2e-6  # the same for norms, rope, activations, cache writes
# A kernel launched from Python: Qwen3-4B, some 430 launches, ran 17 tokens/s without graphs on a
# 910B3 (vllm-ascend issue 770). An upper bound: vLLM's own work is in it.
HOST_LAUNCH = 135e-6
COLLECTIVE = 10e-6  # a sum or gather over devices, besides its bytes (msmodeling)
LINK_EFFICIENCY = 0.7  # of the links between devices (msmodeling)

# kernels per layer; docs/npu.md counts them
MATRIX_KERNELS = 5
VECTOR_KERNELS = 5
ALPHA_KERNELS = 2  # more vector kernels where the residual is scaled (VisualGLM)
POST_NORM_KERNELS = 2  # more where each branch has a norm behind it (GLM-4-0414 and later)
ROW_KERNELS = 1  # one more from two rows on
OUTER_KERNELS = 4  # before and after the layers


class Roofline:
    """Times of a split decoder on a chip; weight_bytes: per device, without the embedding;
    itemsize: of the cache's dtype."""

    def __init__(self, chip: Chip, split: Split, weight_bytes: int, itemsize: int):
        self.chip = chip
        self.split = split
        self.weight_bytes = weight_bytes
        self.itemsize = itemsize

    def token(self, sequences: int, length: int) -> float:
        """Seconds per decoding step of `sequences`, each with `length` tokens in the cache;
        recorded graphs."""
        cached = sequences * length
        return self._seconds(sequences, sequences, pairs=cached, cached=cached)

    def prompt(self, length: int, bidirectional: bool = False) -> float:
        """Seconds until the first token. bidirectional (VisualGLM): all but the last token see each
        other, then the last one is decoded."""
        pairs = length * length
        if bidirectional:
            return self._seconds(length, 1, pairs, length) + self.token(1, length)
        return self._seconds(length, 1, pairs // 2, length)

    def host_bound_prompt(self, bidirectional: bool = False) -> float:
        """The same if launching from Python, as prompts are, is all that counts."""
        kernels = self._kernels(2)
        if bidirectional:
            kernels += self._kernels(1)
        return kernels * HOST_LAUNCH

    def _kernels(self, rows: int) -> int:
        """Of one pass over `rows` tokens."""
        per_layer = MATRIX_KERNELS + self._vector_kernels(rows)
        return OUTER_KERNELS + self.split.config.layers * per_layer

    def _vector_kernels(self, rows: int) -> int:
        """Of one layer."""
        kernels = VECTOR_KERNELS
        if self.split.config.residual_alpha is not None:
            kernels += ALPHA_KERNELS
        if self.split.config.post_norms:
            kernels += POST_NORM_KERNELS
        if rows > 1:
            kernels += ROW_KERNELS
        return kernels

    def _seconds(self, tokens: int, sequences: int, pairs: int, cached: int) -> float:
        """A pass over `tokens`, with logits of `sequences`; pairs: of a query and a key that it
        sees, per head and layer; cached: tokens whose keys and values are read."""
        chip = self.chip
        arithmetic = self._operations(tokens, sequences, pairs) / (chip.flops * COMPUTE_EFFICIENCY)
        memory = self._bytes(cached) / (chip.bandwidth * chip.memory_efficiency)
        vector_launches = self._vector_kernels(tokens) * VECTOR_LAUNCH
        launches = MATRIX_KERNELS * MATRIX_LAUNCH + vector_launches
        return (
            max(arithmetic, memory)
            + self.split.config.layers * launches
            + self._collectives(tokens, sequences)
        )

    def _operations(self, tokens: int, sequences: int, pairs: int) -> int:
        """Multiplications and additions of the matmuls and of attention, per device."""
        c = self.split.config
        head = c.vocab_size * c.hidden // self.split.size
        matmuls = 2 * (layer_values(c) * c.layers * tokens + head * sequences)
        return matmuls + 4 * c.heads * c.head_dim * c.layers * pairs

    def _bytes(self, cached: int) -> int:
        """Weights, keys and values read, per device."""
        c = self.split.config
        return self.weight_bytes + 2 * c.layers * c.kv_heads * c.head_dim * self.itemsize * cached

    def _collectives(self, tokens: int, sequences: int) -> float:
        """Two sums per layer and a gather of the logits, each device sending its share of the bytes
        to all others."""
        c = self.split.config
        size = self.split.size
        if size == 1:
            return 0.0
        sums = 2 * c.layers * tokens * c.hidden * 2
        moved = (sums + sequences * c.vocab_size) * self.itemsize * (size - 1) / size
        return (2 * c.layers + 1) * COLLECTIVE + moved / (self.chip.link * LINK_EFFICIENCY)


def layer_values(c: DecoderConfig) -> int:
    """Weights of one layer's matmuls."""
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    matrices = 3 if c.activation == "swiglu" else 2
    return attention + c.hidden * c.ffn * matrices
