"""The decode step's own kernels (kernels/*.c): bfloat16 tensors in, bfloat16 tensors out.

Takes activations [m, k] with the weights, norms and caches of the layers, and calls the library of
native_library.py through ctypes; the structures here are those of kernels/common.h.

With at most SMALL_BATCH tokens a matmul is memory-bound: each weight is read once. Per-call
overhead between matmuls then dominates, and torch's is too high. Weights stay in the blocks that
oneDNN packed them into (native_blocks.py), so one copy serves its matmuls of many rows and ours.
"""

import ctypes

import torch

from models.network.decoder import NORMS, POST_NORMS

from .native_blocks import Blocks, Int4Blocks
from .native_library import FLOAT, LONG, POINTER, kernels

SMALL_BATCH = 8  # tokens that a matmul of ours takes at most: the rows of its tile
BF16, INT8, INT4 = range(3)  # kinds of matmuls
ZERO = 128  # what stands for 0 in the unsigned activations of INT8


def kernels_support(x: torch.Tensor) -> bool:
    """Can the kernels compute with the activations x [m, k]? Matmuls also need `is_small_batch`."""
    return x.dtype == torch.bfloat16 and x.shape[1] % 16 == 0 and kernels() is not None


def is_small_batch(x: torch.Tensor) -> bool:
    """Can the kernels multiply the activations x [m, k] by a weight?"""
    return len(x) <= SMALL_BATCH and kernels_support(x)


class Matmul(ctypes.Structure):
    """A linear layer [n, k] for up to SMALL_BATCH tokens: bfloat16 [m, k] -> [m, n].

    INT8: (q @ w.T + add) * scale * s + bias. q: x / s rounded to whole numbers, s: of each token
    from its largest value; or, with a fixed s, q: x / s + offset rounded. add int32 [n]: with ZERO
    times the sums of the weight's rows taken off, because the kernel's q are unsigned.
    INT4: x is rounded to 8 bits, each group of 128 values with a scale of its own.
    """

    _fields_ = [
        ("weight", POINTER),
        ("add", POINTER),
        ("scale", POINTER),
        ("bias", POINTER),
        ("kind", LONG),
        ("n", LONG),
        ("k", LONG),
        ("block", LONG),
        ("fixed", FLOAT),
        ("offset", FLOAT),
    ]

    def __init__(
        self,
        kind: int,
        blocks: Blocks | Int4Blocks,
        bias: torch.Tensor | None = None,
        add: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        fixed: float = 0,
        offset: float = 0,
    ):
        """bias [n] of any dtype; add int32 [n], scale float32 [n]: INT8 alone."""
        if bias is not None:
            bias = bias.float()
        self._kept = blocks, bias, add, scale  # their memory is what the structure points to
        super().__init__(
            blocks.address,
            address(add),
            address(scale),
            address(bias),
            kind,
            blocks.n,
            blocks.k,
            blocks.block,
            fixed,
            offset,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 [m, k] -> [m, n]."""
        x = x.contiguous()
        y = x.new_empty(len(x), self.n)
        kernels().matmul(ctypes.byref(self), x.data_ptr(), y.data_ptr(), len(x))
        return y


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's values begin; None (NULL in C) without a tensor."""
    return None if tensor is None else tensor.data_ptr()


class Step(ctypes.Structure):
    """One token of each sequence, as models.network.decoder.Step has it."""

    _fields_ = [
        ("cos", POINTER),
        ("sin", POINTER),
        ("slots", POINTER),
        ("lengths", POINTER),
        ("table", POINTER),
        ("rows", LONG),
        ("table_width", LONG),
        ("block", LONG),
        ("heads", LONG),
        ("kv_heads", LONG),
        ("d", LONG),
    ]

    def __init__(self, step, config, block: int):
        """`block`: tokens of one block of the cache."""
        lengths = torch.tensor(step.kv_lens)
        table = step.block_table.contiguous()
        self._kept = (step.cos.contiguous(), step.sin.contiguous(), step.slots, lengths, table)
        super().__init__(
            *map(address, self._kept),
            *table.shape,
            block,
            config.heads,
            config.kv_heads,
            config.head_dim,
        )

    def attend(self, qkv, keys, values):
        """qkv [rows, width], one layer's caches -> [rows, heads * head_dim].

        q and k are rotated; keys and values go into the caches.
        """
        qkv = qkv.contiguous()
        out = qkv.new_empty(len(qkv), self.heads * self.d)
        kernels().attend(
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            ctypes.byref(self),
            out.data_ptr(),
        )
        return out


class Norm(ctypes.Structure):
    """Weight and bias [width] of a norm, bfloat16; bias NULL without one."""

    _fields_ = [("weight", POINTER), ("bias", POINTER)]

    @classmethod
    def of(cls, norm):
        """Of a models.network.linear.Norm, which must be kept; NULL for a post-norm that a layer
        does not have (None)."""
        return cls() if norm is None else cls(address(norm.weight), address(norm.bias))

    @staticmethod
    def supports(norm) -> bool:
        """Can the kernels read it, or is it None? Anti-outlier methods store biases in float32."""
        if norm is None:
            return True
        if norm.bias is not None and norm.bias.dtype != torch.bfloat16:
            return False
        return norm.weight.dtype == torch.bfloat16


class Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("attention_post_norm", Norm),
        ("mlp_post_norm", Norm),
        ("qkv", Matmul),
        ("out", Matmul),
        ("up", Matmul),
        ("down", Matmul),
        ("keys", POINTER),
        ("values", POINTER),
    ]


class Layers:
    """All layers of a decoder and its last norm in one call.

    What Python does between two kernels takes as long as a tenth of the weights.
    """

    def __init__(self, decoder, matmuls: list[list[Matmul]], cache):
        """matmuls: qkv, out, up and down of every layer."""
        self._kept = matmuls
        self._eps = decoder.config.eps
        self._last = Norm.of(decoder.final_norm)
        layers = []
        for layer, own, caches in zip(decoder.layers, matmuls, cache.layers):
            norms = [Norm.of(getattr(layer, name)) for name in (*NORMS, *POST_NORMS)]
            layers.append(Layer(*norms, *own, *map(address, caches)))
        self._layers = (Layer * len(layers))(*layers)

    @staticmethod
    def support(decoder) -> bool:
        """Is this the arithmetic that the kernels know?"""
        config = decoder.config
        if (config.norm, config.activation, config.residual_alpha) != ("rms", "swiglu", None):
            return False
        norms = [decoder.final_norm]
        for layer in decoder.layers:
            norms += [getattr(layer, name) for name in (*NORMS, *POST_NORMS)]
        return config.ffn % 16 == 0 and all(map(Norm.supports, norms))

    def __call__(self, x, step: Step):
        """x [rows, hidden] -> normalised hidden states [rows, hidden]."""
        x = x.clone()  # the kernel keeps the residual stream in it
        y = torch.empty_like(x)
        kernels().layers(
            self._layers,
            len(self._layers),
            ctypes.byref(self._last),
            ctypes.byref(step),
            x.data_ptr(),
            y.data_ptr(),
            self._eps,
        )
        return y


def round_activations(x, fixed: float = 0, offset: float = 0):
    """bfloat16 [m, k] -> (uint8 [m, k], float32 [m, 1]): the whole numbers q of a Matmul + ZERO,
    and the scale s of each token; `fixed` and `offset` as there."""
    x = x.contiguous()
    q = torch.empty(x.shape, dtype=torch.uint8)
    scales = torch.empty(len(x), 1)
    kernels().round_rows(
        x.data_ptr(),
        q.data_ptr(),
        scales.data_ptr(),
        *x.shape,
        fixed,
        offset,
    )
    return q, scales


def apply_rope(qkv, cos, sin, heads: int):
    """Rotate the first `heads` heads of every token to its position, in place.

    qkv [m, width], cos and sin [m, head_dim], all bfloat16 and contiguous.
    """
    kernels().apply_rope(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        *qkv.shape,
        heads,
        cos.shape[1],
    )


def add_rms_norm(x, residual, norm, eps):
    """(normalised sum, sum) of x [m, width] and the residual; without one (x normalised, None)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    total = None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x)
    kernels().add_rms_norm(
        x.data_ptr(),
        address(residual),
        ctypes.byref(Norm.of(norm)),
        address(total),
        y.data_ptr(),
        *x.shape,
        eps,
    )
    return y, total


def swiglu(x):
    """silu(gate) * up of x [m, 2 * width], gate first."""
    y = x.new_empty(len(x), x.shape[1] // 2)
    kernels().swiglu(x.data_ptr(), y.data_ptr(), *y.shape)
    return y
