"""How long a decoder's step takes on an Ascend chip: the larger of arithmetic and memory time, plus kernel launches and,
over several devices, their sums.

Nothing of this was measured by us. Every parameter is named and says where it comes from; docs/plan.md sets the results
beside the figures that others published. Pictures are not in it: their encoder is another program.
"""

from runtime.ascend.chips import Chip

COMPUTE_EFFICIENCY = 0.6  # of the peak, long prompts; Huawei's msmodeling starts from 0.7
MATRIX_LAUNCH = (
    5e-6  # seconds on the device per product or attention kernel (msmodeling's static cost)
)
VECTOR_LAUNCH = 2e-6  # the same for norms, rope, activations, cache writes
HOST_LAUNCH = 135e-6  # a kernel launched from Python: Qwen3-4B, some 430 launches, ran 17 tokens/s without graphs
#                                 on a 910B3 (vllm-ascend issue 770); an upper bound, vLLM's own work is in it
COLLECTIVE = 10e-6  # a sum or gather over devices, besides its bytes (msmodeling)
LINK_EFFICIENCY = 0.7  # of the links between devices (msmodeling)

MATRIX_KERNELS, VECTOR_KERNELS = 5, 5  # per layer; docs/npu.md counts them
ALPHA_KERNELS = 2  # more vector kernels where the residual is scaled (VisualGLM)
ROW_KERNELS = 1  # one more from two rows on
OUTER_KERNELS = 4  # before and after the layers


class Roofline:
    """Times of the decoder `split` (split.Split) on `chip`, weights of `weight_bytes` per device without the embedding."""

    def __init__(self, chip: Chip, split, weight_bytes: int, itemsize: int):
        self.chip = chip
        self.split = split
        self.weight_bytes = weight_bytes
        self.itemsize = itemsize

    def token(self, sequences: int, length: int) -> float:
        """Seconds per decoding step of `sequences`, each with `length` tokens in the cache; recorded graphs."""
        return self._seconds(sequences, sequences, sequences * length, sequences * length)

    def prompt(self, length: int, bidirectional: bool = False) -> float:
        """Seconds until the first token. bidirectional (VisualGLM): all but the last token see each other, then the last
        one is decoded."""
        if bidirectional:
            return self._seconds(length, 1, length * length, length) + self.token(1, length)
        return self._seconds(length, 1, length * length // 2, length)

    def host_bound_prompt(self, bidirectional: bool = False) -> float:
        """The same if launching from Python, as prompts are, is all that counts."""
        return (self._kernels(2) + bidirectional * self._kernels(1)) * HOST_LAUNCH

    def _kernels(self, rows: int) -> int:
        return OUTER_KERNELS + self.split.config.layers * (
            MATRIX_KERNELS + self._vector_kernels(rows)
        )

    def _vector_kernels(self, rows: int) -> int:
        return (
            VECTOR_KERNELS
            + ALPHA_KERNELS * (self.split.config.residual_alpha is not None)
            + ROW_KERNELS * (rows > 1)
        )

    def _seconds(self, tokens, sequences, pairs, cached) -> float:
        c = self.split.config
        chip = self.chip
        head = c.vocab_size * c.hidden // self.split.size
        products = (
            2 * (layer_values(c) * c.layers * tokens + head * sequences)
            + 4 * c.heads * c.head_dim * c.layers * pairs
        )
        moved = self.weight_bytes + 2 * c.layers * c.kv_heads * c.head_dim * self.itemsize * cached
        device = max(
            products / (chip.flops * COMPUTE_EFFICIENCY),
            moved / (chip.bandwidth * chip.memory_efficiency),
        )
        launches = c.layers * (
            MATRIX_KERNELS * MATRIX_LAUNCH + self._vector_kernels(tokens) * VECTOR_LAUNCH
        )
        return device + launches + self._collectives(tokens, sequences)

    def _collectives(self, tokens: int, sequences: int) -> float:
        """Two sums per layer and a gather of the logits, each device sending its share of the bytes to all others."""
        c = self.split.config
        size = self.split.size
        if size == 1:
            return 0.0
        sums = 2 * c.layers * tokens * c.hidden * 2
        moved = (sums + sequences * c.vocab_size) * self.itemsize * (size - 1) / size
        return (2 * c.layers + 1) * COLLECTIVE + moved / (self.chip.link * LINK_EFFICIENCY)


def layer_values(c) -> int:
    """Weights of one layer's products."""
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return attention + c.hidden * c.ffn * (3 if c.activation == "swiglu" else 2)
