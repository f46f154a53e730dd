"""Builds and loads the library of the CPU's own kernels (kernels/*.c).

Takes the sources, this machine's C compiler and its CPU flags; returns the library, loaded with
ctypes. It is built once on each machine and kept in the cache. Without a compiler, or on a CPU
without the instructions, `kernels()` is None and torch's operators do everything.
"""

import ctypes
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from models.errors import ModelError
from models.files import read_record
from runtime.common.files import cache_folder, file_entry, open_private, write_atomically
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
        library = load_library()
    except (OSError, ModelError, subprocess.CalledProcessError) as error:
        note(f"warning: decoding is slower, its own kernels cannot be built ({error})")
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = None
    return library


def load_library() -> ctypes.CDLL:
    """The library of these sources, compiled if the cache has none, or has one that is damaged or
    not this user's.

    Raises OSError, ModelError or subprocess.CalledProcessError when it cannot be had.
    """
    library = library_path()
    try:
        return _checked(library)
    except (OSError, ModelError, ValueError, KeyError, TypeError) as error:
        if library.exists():
            note(f"compiling the CPU's kernels again: {error}")
    _build(library)
    return _checked(library)


def library_path() -> Path:
    """Where the library belongs: its name is a hash of the sources, the command, the compiler and
    the CPU."""
    sources = [source.read_text() for source in _sources("*.[ch]")]
    identity = [_cpu_flags(), _compiler(), *COMMAND, *sources]
    digest = hashlib.sha256("".join(identity).encode()).hexdigest()[:16]
    return cache_folder("kernels") / f"{digest}.so"


def _checked(library: Path) -> ctypes.CDLL:
    """The library, loaded from the open file that was checked: its code runs in this process.

    OSError if there is none; ModelError if it is not this user's, or not the one that was compiled.
    """
    with open_private(_record(library)) as stream:
        recorded = read_record(stream)["sha256"]
    with open_private(library) as stream:
        if hashlib.sha256(stream.read()).hexdigest() != recorded:
            raise ModelError(f"{library} is damaged: its bytes are not those that were compiled")
        return ctypes.CDLL(f"/proc/self/fd/{stream.fileno()}")


def _record(library: Path) -> Path:
    """The file with the library's {bytes, sha256}, written last."""
    return library.with_suffix(".json")


def _sources(pattern: str) -> list[Path]:
    return sorted(SOURCES.glob(pattern))


def _build(library: Path):
    """Compile next to `library`, then rename: a half-written file never bears its name."""
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        new = Path(work, "new.so")
        command = [_compiler(), *COMMAND, "-o", new, *_sources("*.c"), "-lm"]
        subprocess.run(command, check=True, capture_output=True)
        new.chmod(0o755)  # whatever the umask
        entry = file_entry(new)
        os.replace(new, library)
    write_atomically(_record(library), json.dumps(entry))


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
