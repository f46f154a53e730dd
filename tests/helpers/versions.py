"""Runs the suite on other versions of Python and of packages, and prints a table of versions and counts.

`python tests/helpers/versions.py [--only 3.10 onnxruntime ...] [-- pytest arguments]`, with the Python of the
main environment: it has the highest releases that setup.py admits. Every other Python that is found
(python3.N in PATH, pyenv) gets an environment of its own in out/versions; the lowest release of a
package lies over the main environment. Exit code 1 when a test fails, 3 when a Python is missing or
a release cannot be installed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "versions"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LOWEST = ("onnxruntime", "numpy", "onnx", "onnxscript", "tokenizers", "transformers")
SHOWN = ("onnxruntime", "numpy", "onnx", "torch", "transformers")
WITHOUT_QUANT = ("3.13",)  # msmodelslim's wheel has binaries for Python up to 3.12
PIP = ("-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
FAILED, MISSING = 1, 3


def find_python(version: str) -> str | None:
    """Path of python3.N in PATH or among pyenv's; None where it is missing."""
    found = [shutil.which(f"python{version}")]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += [str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python"))]
    for path in filter(None, found):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if said.stdout.startswith(f"Python {version}."):
            return path
    return None


def lowest_release(package: str, setup: str) -> str:
    """ "1.20" where setup.py says "onnxruntime>=1.20"."""
    return re.search(rf'"{package}>=([\d.]+)', setup)[1]


def environment(name: str, python: str, *packages: str, over_main: bool = False) -> str | None:
    """Path of the Python of an environment with these packages; None if they cannot be had."""
    folder = FOLDER / name
    made = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "venv", folder], check=True)
    if over_main:
        [site] = folder.glob("lib/python*/site-packages")
        main = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "main.pth").write_text(main)
    done = subprocess.run([made, *PIP, *packages], cwd=ROOT, check=False)
    return made if done.returncode == 0 else None


def versions_of(python: str) -> str:
    """Of this environment's Python and packages, as the table shows them."""
    code = (
        "import platform; from importlib.metadata import version\n"
        f"print('Python', platform.python_version(), *[n + ' ' + version(n) for n in {SHOWN}], sep=', ')"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace("Python, ", "Python ")


def run_suite(python: str, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code and its last line, the counts."""
    done = subprocess.run(
        [python, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line}", flush=True)
    return done.returncode, lines[-1].strip("= ") if lines else "no output"


def on_python(version: str) -> str | None:
    if sys.version.startswith(f"{version}."):
        return sys.executable
    python = find_python(version)
    return python and environment(version, python, "-e", ".[dev]")


def on_lowest(package: str) -> str | None:
    release = lowest_release(package, (ROOT / "setup.py").read_text(encoding="utf-8"))
    pin = f"{package}=={release}.*"
    return environment(f"lowest-{package}", sys.executable, pin, over_main=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*PYTHONS, *LOWEST])
    parser.add_argument("tests", nargs="*", help="arguments of pytest, behind --")
    options = parser.parse_args()
    rows = []
    codes = {0}
    for name in options.only:
        python = on_python(name) if name in PYTHONS else on_lowest(name)
        if python is None:
            rows.append((name, "missing, or its packages cannot be installed", "not run"))
            codes.add(MISSING)
            continue
        arguments = options.tests or ["tests"]
        if name in WITHOUT_QUANT:
            arguments = [*arguments, "--ignore=tests/quant"]
        code, counts = run_suite(python, arguments)
        rows.append((name, versions_of(python), counts))
        codes.add(FAILED if code else 0)
    for name, versions, counts in rows:
        title = f"Python {name}" if name in PYTHONS else f"lowest {name}"
        note = " (without tests/quant)" if name in WITHOUT_QUANT else ""
        print(f"| {title}{note} | {versions} | {counts} |")
    return FAILED if FAILED in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
