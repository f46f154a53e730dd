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

from ..artifact import cache_root

FEW = 8                 # rows of a product's tile
ANY = sys.maxsize
ZERO = 128              # what stands for 0 in its unsigned activations
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
SOURCES = Path(__file__).with_name("kernels")
COMMAND = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
P, N, L, F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "linear_bf16": (P, P, P, P, N, L, L, L), "linear_int8": (P, P, P, P, P, P, P, N, L, L, L, F, F),
    "linear_int4": (P, P, P, P, P, P, P, N, L, L), "floats_int4": (P, P, P, L, L), "round_rows": (P, P, P, N, L, F, F),
    "add_rms_norm": (P, P, P, P, P, N, L, F), "swiglu": (P, P, N, L), "turn_rows": (P, P, P, N, L, L, L),
    "attend": (P, P, P, P, P, P, L, P, P, P)}


def missing() -> str:
    """What keeps this machine from having the kernels; empty: nothing."""
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
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
        print(f"warning: decoding is slower, its own kernels cannot be built ({error})", file=sys.stderr)
        return None
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, None
    return library


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def _built() -> Path:
    """The library's file, under a hash of the sources, the compiler and the CPU."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    known = "".join([cpu, _compiler(), *COMMAND, *(file.read_text() for file in sources)])
    library = cache_root() / "kernels" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            subprocess.run([_compiler(), *COMMAND, "-o", f"{work}/new.so", *(f for f in sources if f.suffix == ".c"), "-lm"],
                           check=True, capture_output=True)
            os.replace(f"{work}/new.so", library)
    return library


def suits(x: torch.Tensor, rows: int = FEW) -> bool:
    """Can the kernels take the activations x [m, k], at most `rows` of them?"""
    return x.dtype == torch.bfloat16 and len(x) <= rows and x.shape[1] % 16 == 0 and kernels() is not None


@dataclass
class Blocks:
    """A weight [n, k] in oneDNN's blocks: [n / block, rounded up][k / each][block][each], 4 bytes of k side by side."""
    address: int
    n: int
    k: int
    block: int

    def linear(self, x, bias):
        """bfloat16 [m, k] -> [m, n]; bias float32 or None."""
        x, y = x.contiguous(), x.new_empty(len(x), self.n)
        kernels().linear_bf16(x.data_ptr(), self.address, address(bias), y.data_ptr(), len(x), self.n, self.k, self.block)
        return y

    def linear_int8(self, x, add, scale, bias, fixed: float = 0, offset: float = 0):
        """bfloat16 [m, k] -> [m, n] = (q @ w.T + add) * scale * s + bias. q: x / s rounded to whole numbers, s of each
        token from its largest value; or, with a fixed s, those of x / s + offset. add: int32, with ZERO times the sums of
        the weight's rows taken off, for the kernel's q are unsigned."""
        x, y, q = x.contiguous(), x.new_empty(len(x), self.n), x.new_empty(x.shape, dtype=torch.uint8)
        kernels().linear_int8(x.data_ptr(), self.address, add.data_ptr(), scale.data_ptr(), address(bias), q.data_ptr(),
                              y.data_ptr(), len(x), self.n, self.k, self.block, fixed, offset)
        return y


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def blocks_of(packed: torch.Tensor, weight: torch.Tensor) -> Blocks | None:
    """Where oneDNN put `weight` [n, k], bfloat16 or int8; None when it lies in another order than the kernels read, which the
    first and the last block show."""
    each, (n, k) = 4 // weight.element_size(), weight.shape
    if not packed.is_mkldnn or kernels() is None or n % 16 or k % 16:
        return None
    at, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    raw = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=weight.dtype)
    for block in (64, 48, 32, 16):
        count = -(-n // block)
        if len(raw) >= count * block * k and all(
                torch.equal(raw[i * block * k:][:block * k].view(k // each, block, each)[:, :len(rows)],
                            rows.unflatten(1, (-1, each)).transpose(0, 1))
                for i, rows in ((i, weight[i * block:][:block]) for i in (0, count - 1))):
            return Blocks(at, n, k, block)
    return None


class Int4Blocks:
    """4-bit weights [n, k] as the kernels read them: 16 rows at a time, of each a word of 8 values. Word s of the 16 of a
    group of 128 has the pairs of values s, 16 + s (lower nibbles of its four bytes), 32 + s, 48 + s (upper ones)."""

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        """As packed.Int4Weight takes them: q uint8 [n, k / 2], scales bfloat16 [k / 128, n, 2]."""
        self.n, self.k = len(q), 2 * q.shape[1]
        self.many = 4 * FEW
        self._words = torch.cat([_words(rows) for rows in q.split(1024)])
        self._scales = scales.unflatten(1, (-1, 16)).permute(1, 0, 3, 2).contiguous()

    def linear(self, x):
        """bfloat16 [m, k] -> [m, n]; x is rounded to 8 bits, each group of 128 values with a scale of its own."""
        y, q = x.new_empty(len(x), self.n), torch.empty(FEW, self.k, dtype=torch.int8)
        scales, sums = torch.empty(2, FEW * self.k // 128)
        for rows, out in zip(x.split(FEW), y.split(FEW)):
            kernels().linear_int4(rows.data_ptr(), self._words.data_ptr(), self._scales.data_ptr(), q.data_ptr(),
                                  scales.data_ptr(), sums.data_ptr(), out.data_ptr(), len(rows), self.n, self.k)
        return y

    def floats(self, start: int, end: int) -> torch.Tensor:
        """Rows start..end, multiples of 16, in bfloat16 [end - start, k]."""
        out = torch.empty(end - start, self.k, dtype=torch.bfloat16)
        kernels().floats_int4(self._words[start // 16].data_ptr(), self._scales[start // 16].data_ptr(), out.data_ptr(),
                              end - start, self.k)
        return out


def _words(q):
    """[n, k / 2] -> int32 [n / 16, k / 128, 16 words, 16 rows]."""
    pairs = q.view(len(q), -1, 4, 16).int()
    words = sum((pairs[:, :, j] & 15) << at | pairs[:, :, j] >> 4 << at + 8 for j, at in enumerate((0, 16, 4, 20)))
    return words.unflatten(0, (-1, 16)).permute(0, 2, 3, 1).contiguous()


class Shape(ctypes.Structure):
    _fields_ = [("slots", P), ("lengths", P), ("table", P)] + [
        (name, L) for name in ("rows", "table_width", "block", "heads", "kv_heads", "d")]


class Attention:
    """Attention of one step, one token of each sequence, for all layers."""

    def __init__(self, step, config, block: int):
        self._step, rows, (width,) = step, len(step.q_lens), step.block_table.shape[1:]
        self._lengths, self._table = torch.tensor(step.kv_lens), step.block_table.contiguous()
        self._shape = Shape(step.slots.data_ptr(), self._lengths.data_ptr(), self._table.data_ptr(), rows, width, block,
                            config.heads, config.kv_heads, config.head_dim)
        self._room = -(-max(step.kv_lens) // 16) * 16
        self._q = step.cos.new_empty(rows, config.heads, config.head_dim)
        self._p = torch.empty(rows * config.heads * self._room)

    def __call__(self, qkv, keys, values):
        """qkv [rows, width], one layer's caches -> [rows, heads * head_dim]."""
        qkv, out = qkv.contiguous(), self._q.new_empty(len(qkv), self._q[0].numel())
        kernels().attend(qkv.data_ptr(), self._step.cos.data_ptr(), self._step.sin.data_ptr(), keys.data_ptr(),
                         values.data_ptr(), ctypes.byref(self._shape), self._room, self._q.data_ptr(), self._p.data_ptr(),
                         out.data_ptr())
        return out


def rounded(x, fixed: float = 0, offset: float = 0):
    """bfloat16 [m, k] -> uint8 [m, k], the whole numbers q of `Blocks.linear_int8` + ZERO, and float32 [m, 1], their s."""
    x, q, scales = x.contiguous(), torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    kernels().round_rows(x.data_ptr(), q.data_ptr(), scales.data_ptr(), *x.shape, fixed, offset)
    return q, scales


def turn(qkv, cos, sin, heads: int):
    """The first `heads` of every token's heads are turned to its position, in place; qkv [m, width], cos and sin [m, d]."""
    kernels().turn_rows(qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), *qkv.shape, heads, cos.shape[1])


def add_rms_norm(x, residual, weight, eps):
    """(normalised sum, sum) of x [m, width] and the residual; without one of x alone."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    kernels().add_rms_norm(x.data_ptr(), address(residual), weight.data_ptr(), address(total), y.data_ptr(), *x.shape, eps)
    return y, total


def swiglu(x):
    """silu(gate) * up of x [m, 2 * width], gate first."""
    y = x.new_empty(len(x), x.shape[1] // 2)
    kernels().swiglu(x.data_ptr(), y.data_ptr(), *y.shape)
    return y
