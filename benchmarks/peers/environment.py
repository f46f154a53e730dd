"""One Python environment per peer, with its packages from PyPI."""

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
    "llamacpp": (
        "llama-cpp-python==0.3.36",
        "gguf==0.19.*",
    ),  # built from source: cmake and a compiler are needed
    "onnxruntime": ("onnxruntime>=1.20",),
}
REMOVED = {
    "openvino": ("torchvision",)
}  # optimum-intel's import fails beside a torch it was not built for
FRESH = {
    "llamacpp": ("--no-cache-dir",)
}  # pip keeps what it built once, whatever flags it was built with
BUILD = {
    "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",  # this CPU's instructions, no picture tools
    "CXXFLAGS": f"-include {Path(__file__).with_name('tileconfig.h')}",
}


def python_of(peer: str) -> Path:
    return Path(sys.executable) if peer == "ours" else ROOT / f".venv-peers-{peer}" / "bin/python"


def ensure(peer: str) -> str | None:
    """Install a peer unless that was done; None, or the reason why it is missing."""
    python = python_of(peer)
    done = python.parents[1] / ".installed"
    if peer == "ours" or done.is_file():
        return None
    print(f"installing {' '.join(PACKAGES[peer])} into {python.parents[1].name}", file=sys.stderr)
    commands = [
        [sys.executable, "-m", "venv", python.parents[1]],
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *FRESH.get(peer, ()),
            *PACKAGES[peer],
        ],
        *(
            [python, "-m", "pip", "uninstall", "--quiet", "--yes", name]
            for name in REMOVED.get(peer, ())
        ),
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | BUILD)
        if result.returncode:
            return f"could not be installed: {last_line(result.stderr)}"
    done.touch()
    return None


def last_line(text: str) -> str:
    """Of what a program said, the line that most likely names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]
