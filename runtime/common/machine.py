"""Facts of this machine: processor, memory, versions of packages."""

from __future__ import annotations

import contextlib
import platform
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

    versions = {name: version(name) for name in PACKAGES}
    return {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: v for name, v in versions.items() if v},
    }


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]} ({len(names)} CPUs)" if names else platform.machine()
    return platform.processor() or platform.machine()


def gib(size: int) -> str:
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
