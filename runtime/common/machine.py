"""Facts of this machine: processor, memory, versions of packages.

Takes names, returns what the system and Python's package metadata say.
"""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "ascend-vlm",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "safetensors",
    "sentencepiece",
    "pillow",
)


def environment() -> dict:
    """The machine and the versions that were used."""
    import torch

    found = {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        installed = version(package)
        if installed:
            found[package] = installed
    return found


def version(package: str) -> str | None:
    """Of an installed Python package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """ "Intel Xeon 6 (16 CPUs)"; where the system does not say, the architecture."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if not names:
            return platform.machine()
        return f"{names[0]} ({len(names)} CPUs)"
    return platform.processor() or platform.machine()


def gib(size: int) -> str:
    """Bytes as messages show them, in GiB."""
    return f"{size / 2**30:.2f}"


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    available, _ = memory()
    return available


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(available, total) bytes of main memory, from the proc/meminfo in `root`."""
    text = (root / "proc/meminfo").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    available, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return available * 1024, total * 1024
