"""The decode step's own kernels (kernels/): built once on each machine with its C compiler, called through ctypes.

Of at most FEW tokens, bfloat16 [m, k], a product reads each weight once and is as fast as memory, if little happens between
two products: torch's calls cost more there than what they compute. Weights stay in the blocks that oneDNN packed them into,
so one copy serves its products of many rows and ours. Without a compiler or on another CPU `kernels()` is None and torch's
operators do everything.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.common.files import cache_root

FEW = 8  # rows of a product's tile
ANY = sys.maxsize
BF16, INT8, INT4 = range(3)  # kinds of products
ZERO = 128  # what stands for 0 in its unsigned activations
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
SOURCES = Path(__file__).with_name("kernels")
COMMAND = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
P = ctypes.c_void_p
N = ctypes.c_int
L = ctypes.c_long
F = ctypes.c_float
SIGNATURES = {
    "product": (P, P, P, N),
    "attend": (P, P, P, P, P),
    "layers": (P, L, P, P, P, P, F),
    "floats_int4": (P, P, L, L),
    "round_rows": (P, P, P, N, L, F, F),
    "add_rms_norm": (P, P, P, P, P, N, L, F),
    "swiglu": (P, P, N, L),
    "turn_rows": (P, P, P, N, L, L, L),
}


def missing() -> str:
    """What keeps this machine from having the kernels; empty: nothing."""
    flags = (
        set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    )
    if not flags >= NEEDED:
        return "the CPU has no AVX-512 with BF16 and VNNI"
    return "" if _compiler() else "there is no C compiler; run: apt-get install gcc"


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library, built if this machine has none of these sources yet; None without one."""
    if missing():
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"warning: decoding is slower, its own kernels cannot be built ({error})",
            file=sys.stderr,
        )
        return None
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    return library


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def _built() -> Path:
    """The library's file, under a hash of the sources, the compiler and the CPU."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    cpu = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    )
    known = "".join([cpu, _compiler(), *COMMAND, *(file.read_text() for file in sources)])
    library = cache_root() / "kernels" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            subprocess.run(
                [
                    _compiler(),
                    *COMMAND,
                    "-o",
                    f"{work}/new.so",
                    *(f for f in sources if f.suffix == ".c"),
                    "-lm",
                ],
                check=True,
                capture_output=True,
            )
            os.replace(f"{work}/new.so", library)
    return library


def suits(x: torch.Tensor, rows: int = FEW) -> bool:
    """Can the kernels take the activations x [m, k], at most `rows` of them?"""
    return (
        x.dtype == torch.bfloat16
        and len(x) <= rows
        and x.shape[1] % 16 == 0
        and kernels() is not None
    )


class Product(ctypes.Structure):
    """A linear layer [n, k] as the kernels read it, for up to FEW tokens: bfloat16 [m, k] -> [m, n].

    INT8: (q @ w.T + add) * scale * s + bias, q: x / s rounded to whole numbers, s of each token from its largest value; or,
    with a fixed s, those of x / s + offset. add: int32, with ZERO times the sums of the weight's rows taken off, for the
    kernel's q are unsigned. INT4: x is rounded to 8 bits, each group of 128 values with a scale of its own.
    """

    _fields_ = [
        ("weight", P),
        ("add", P),
        ("scale", P),
        ("bias", P),
        ("kind", L),
        ("n", L),
        ("k", L),
        ("block", L),
        ("fixed", F),
        ("offset", F),
    ]

    def __init__(
        self,
        kind: int,
        blocks,
        bias=None,
        add=None,
        scale=None,
        fixed: float = 0,
        offset: float = 0,
    ):
        """blocks: Blocks or Int4Blocks; bias of any dtype."""
        bias = None if bias is None else bias.float()
        self._kept = blocks, bias, add, scale  # they lie where the structure says
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

    def __call__(self, x):
        x, y = x.contiguous(), x.new_empty(len(x), self.n)
        kernels().product(ctypes.byref(self), x.data_ptr(), y.data_ptr(), len(x))
        return y


@dataclass
class Blocks:
    """A weight [n, k] in oneDNN's blocks: [n / block, rounded up][k / each][block][each], 4 bytes of k side by side."""

    address: int
    n: int
    k: int
    block: int


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def blocks_of(packed: torch.Tensor, weight: torch.Tensor) -> Blocks | None:
    """Where oneDNN put `weight` [n, k], bfloat16 or int8; None when it lies in another order than the kernels read, which the
    first and the last block show."""
    each, (n, k) = 4 // weight.element_size(), weight.shape
    if not packed.is_mkldnn or kernels() is None or n % 16 or k % 16:
        return None
    at = torch.ops.mkldnn.data_ptr(packed)
    size = torch.ops.mkldnn._nbytes(packed)
    raw = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=weight.dtype)
    for block in (64, 48, 32, 16):
        count = -(-n // block)
        if len(raw) >= count * block * k and all(
            torch.equal(
                raw[i * block * k :][: block * k].view(k // each, block, each)[:, : len(rows)],
                rows.unflatten(1, (-1, each)).transpose(0, 1),
            )
            for i, rows in ((i, weight[i * block :][:block]) for i in (0, count - 1))
        ):
            return Blocks(at, n, k, block)
    return None


class Int4Blocks:
    """4-bit weights [n, k] as the kernels read them, one line of memory after another: of 16 rows and a group of 128 values 16
    lines of words and one of scales and zeros. A word is 8 values of a row; word s has the pairs of values s, 16 + s (lower
    nibbles of its four bytes), 32 + s, 48 + s (upper ones)."""

    block = 16
    many = 4 * FEW  # tokens from which making them bfloat16 is quicker

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """As packed.Int4Weight takes them: q uint8 [n, k / 2], scales bfloat16 [k / 128, n, 2]."""
        self.n = len(q)
        self.k = 2 * q.shape[1]
        scales = (
            scales.unflatten(1, (-1, 16))
            .permute(1, 0, 3, 2)
            .contiguous()
            .view(torch.int32)
            .flatten(2)
            .unsqueeze(2)
        )
        self._lines = torch.cat(
            [
                torch.cat((_words(rows), own), 2)
                for rows, own in zip(q.split(1024), scales.split(64))
            ]
        )
        self.address = self._lines.data_ptr()

    def floats(self, start: int, end: int) -> torch.Tensor:
        """Rows start..end, multiples of 16, in bfloat16 [end - start, k]."""
        out = torch.empty(end - start, self.k, dtype=torch.bfloat16)
        kernels().floats_int4(
            self._lines[start // 16].data_ptr(), out.data_ptr(), end - start, self.k
        )
        return out


def _words(q):
    """[n, k / 2] -> int32 [n / 16, k / 128, 16 words, 16 rows]."""
    pairs = q.view(len(q), -1, 4, 16).int()
    words = sum(
        (pairs[:, :, j] & 15) << at | pairs[:, :, j] >> 4 << at + 8
        for j, at in enumerate((0, 16, 4, 20))
    )
    return words.unflatten(0, (-1, 16)).permute(0, 2, 3, 1).contiguous()


class Step(ctypes.Structure):
    """One token of each sequence, as models.network.decoder.Step has it."""

    _fields_ = [("cos", P), ("sin", P), ("slots", P), ("lengths", P), ("table", P)] + [
        (name, L) for name in ("rows", "table_width", "block", "heads", "kv_heads", "d")
    ]

    def __init__(self, step, config, block: int):
        self._kept = kept = (
            step.cos.contiguous(),
            step.sin.contiguous(),
            step.slots,
            torch.tensor(step.kv_lens),
            step.block_table.contiguous(),
        )
        super().__init__(
            *map(address, kept),
            *step.block_table.shape,
            block,
            config.heads,
            config.kv_heads,
            config.head_dim,
        )

    def attend(self, qkv, keys, values):
        """qkv [rows, width], one layer's caches -> [rows, heads * head_dim]."""
        qkv, out = qkv.contiguous(), qkv.new_empty(len(qkv), self.heads * self.d)
        kernels().attend(
            qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), ctypes.byref(self), out.data_ptr()
        )
        return out


class Norm(ctypes.Structure):
    _fields_ = [("weight", P), ("shift", P)]

    @classmethod
    def of(cls, norm):
        """Of a models.network.linear.Norm, which must be kept."""
        return cls(address(norm.weight), address(norm.bias))

    @staticmethod
    def suits(norm) -> bool:
        """Can the kernels read it? Anti-outlier methods store biases in float32."""
        return all(
            tensor is None or tensor.dtype == torch.bfloat16 for tensor in (norm.weight, norm.bias)
        )


class Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("qkv", Product),
        ("out", Product),
        ("up", Product),
        ("down", Product),
        ("keys", P),
        ("values", P),
    ]


class Layers:
    """All layers of a decoder and its last norm in one call: what Python does between two kernels takes as long as a tenth of
    the weights."""

    def __init__(self, decoder, products: list[list[Product]], cache):
        """products: qkv, out, up and down of every layer."""
        self._kept = products
        self._eps = decoder.config.eps
        self._last = Norm.of(decoder.final_norm)
        self._layers = (Layer * len(products))(
            *(
                Layer(
                    Norm.of(layer.attention_norm),
                    Norm.of(layer.mlp_norm),
                    *four,
                    *map(address, caches),
                )
                for layer, four, caches in zip(decoder.layers, products, cache.layers)
            )
        )

    @staticmethod
    def suit(decoder) -> bool:
        """Is this the arithmetic that the kernels know?"""
        c = decoder.config
        norms = [
            decoder.final_norm,
            *(n for layer in decoder.layers for n in (layer.attention_norm, layer.mlp_norm)),
        ]
        return (
            (c.norm, c.activation, c.residual_alpha) == ("rms", "swiglu", None)
            and c.ffn % 16 == 0
            and all(map(Norm.suits, norms))
        )

    def __call__(self, x, step: Step):
        """x [rows, hidden] -> normalised hidden states [rows, hidden]."""
        x, y = x.clone(), torch.empty_like(x)
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


def rounded(x, fixed: float = 0, offset: float = 0):
    """bfloat16 [m, k] -> uint8 [m, k], the whole numbers q of a Product + ZERO, and float32 [m, 1], their s."""
    x, q, scales = x.contiguous(), torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    kernels().round_rows(x.data_ptr(), q.data_ptr(), scales.data_ptr(), *x.shape, fixed, offset)
    return q, scales


def turn(qkv, cos, sin, heads: int):
    """The first `heads` of every token's heads are turned to its position, in place; qkv [m, width], cos and sin [m, d]."""
    kernels().turn_rows(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), *qkv.shape, heads, cos.shape[1]
    )


def add_rms_norm(x, residual, norm, eps):
    """(normalised sum, sum) of x [m, width] and the residual; without one of x alone."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
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
