"""Makes a Python environment per peer, with the peer's packages from PyPI."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch>=2.13,<2.14"
PACKAGES = {
    "transformers": (TORCH, "transformers>=5,<6"),
    "openvino": (
        TORCH,
        "openvino-genai==2026.4.*",
        "optimum-intel==2.2.*",
        "nncf==3.4.*",
        "transformers==4.57.*",
    ),
    # built from source: cmake and a compiler are needed
    "llamacpp": ("llama-cpp-python==0.3.36", "gguf==0.19.*"),
    "onnxruntime": ("onnxruntime>=1.20",),
}
# optimum-intel's import fails if torchvision was built for another torch
REMOVED = {"openvino": ("torchvision",)}
# pip caches what it built once, whatever flags it was built with
FRESH = {"llamacpp": ("--no-cache-dir",)}
BUILD = {
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",  # this CPU's instructions, no picture tools
    "CXXFLAGS": f"-include {Path(__file__).with_name('tileconfig.h')}",
}


def python_of(peer: str) -> Path:
    if peer == "ours":
        return Path(sys.executable)
    return ROOT / f".venv-peers-{peer}" / "bin/python"


def install(peer: str) -> str | None:
    """Installs a peer unless that was done. Returns None, or the reason why the peer is missing."""
    python = python_of(peer)
    done = python.parents[1] / ".installed"
    if peer == "ours" or done.is_file():
        return None
    print(f"installing {' '.join(PACKAGES[peer])} into {python.parents[1].name}", file=sys.stderr)
    pip = [python, "-m", "pip"]
    flags = ["--quiet", "--disable-pip-version-check", *FRESH.get(peer, ())]
    commands = [
        [sys.executable, "-m", "venv", python.parents[1]],
        [*pip, "install", *flags, *PACKAGES[peer]],
    ]
    for name in REMOVED.get(peer, ()):
        commands.append([*pip, "uninstall", "--quiet", "--yes", name])
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | BUILD)
        if result.returncode:
            return f"could not be installed: {error_line(result.stderr)}"
    done.touch()
    return None


def error_line(text: str) -> str:
    """The line of a program's output that most likely names the error, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]
