"""Builds and loads the library of the CPU's own kernels (kernels/*.c).

Takes the sources, this machine's C compiler and its CPU flags; returns the library, loaded with
ctypes. It is built once on each machine and kept in the cache. Without a compiler, or on a CPU
without the instructions, `kernels()` is None and torch's operators do everything.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from runtime.common.files import cache_root
from runtime.common.notes import note

NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
SOURCES = Path(__file__).with_name("kernels")
CPUINFO = Path("/proc/cpuinfo")
COMMAND = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

POINTER = ctypes.c_void_p
INT = ctypes.c_int
LONG = ctypes.c_long
FLOAT = ctypes.c_float

# fmt: off
SIGNATURES = {  # as kernels/common.h and the sources declare them
    "matmul": (POINTER, POINTER, POINTER, INT),
    "attend": (POINTER, POINTER, POINTER, POINTER, POINTER),
    "layers": (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, FLOAT),
    "floats_int4": (POINTER, POINTER, LONG, LONG),
    "round_rows": (POINTER, POINTER, POINTER, INT, LONG, FLOAT, FLOAT),
    "add_rms_norm": (POINTER, POINTER, POINTER, POINTER, POINTER, INT, LONG, FLOAT),
    "swiglu": (POINTER, POINTER, INT, LONG),
    "apply_rope": (POINTER, POINTER, POINTER, INT, LONG, LONG, LONG),
}
# fmt: on


def missing() -> str:
    """What keeps this machine from having the kernels; empty: nothing."""
    flags = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    if not flags >= NEEDED:
        return "the CPU has no AVX-512 with BF16 and VNNI"
    return "" if _compiler() else "there is no C compiler; run: apt-get install gcc"


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The library, built first if the cache has none of these sources; None where it cannot be."""
    if missing():
        return None
    try:
        library = ctypes.CDLL(str(built_library()))
    except (OSError, subprocess.CalledProcessError) as error:
        note(f"warning: decoding is slower, its own kernels cannot be built ({error})")
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def built_library() -> Path:
    """The library's file, named by a hash of the sources, the command, the compiler and the CPU.

    Raises OSError or subprocess.CalledProcessError when it cannot be built.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    identity = [_cpu_flags(), _compiler(), *COMMAND, *(source.read_text() for source in sources)]
    digest = hashlib.sha256("".join(identity).encode()).hexdigest()[:16]
    library = cache_root() / "kernels" / f"{digest}.so"
    if not library.exists():
        _build([source for source in sources if source.suffix == ".c"], library)
    return library


def _build(sources: list[Path], library: Path):
    """Compile next to `library`, then rename: a half-written file never bears its name."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        new = f"{work}/new.so"
        command = [_compiler(), *COMMAND, "-o", new, *sources, "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(new, library)


def _cpu_flags() -> str:
    lines = CPUINFO.read_text().splitlines()
    return next(line for line in lines if line.startswith("flags"))


def _compiler() -> str | None:
    """Path of the first C compiler there is: $CC (else cc), gcc, clang."""
    for name in (os.environ.get("CC", "cc"), "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return path
    return None
