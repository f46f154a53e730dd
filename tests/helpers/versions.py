"""Runs the tests on other versions of Python and of packages, and prints a table of versions and
counts.

`python tests/helpers/versions.py [--only 3.10 onnxruntime ...] [-- pytest arguments]`, with the
Python of the main environment. Its environments lie in out/versions:

- one for each other Python that is found (python3.N in PATH, pyenv), with the highest releases that
  setup.py admits there; the whole suite runs. $TORCH_INDEX: where to take torch from;
- `highest`: this environment with all packages at their highest release; the whole suite runs
  unless nothing is higher than here;
- one for the lowest release of each package on which results depend: this environment (its files
  linked, not copied), in which pip resolves that release. The tests of the rooms that import the
  package run.

Exit code 1 when a test fails; 3 when packages cannot be installed, or a Python is missing, unless
--if-found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "versions"
SETUP = ROOT / "setup.py"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
HIGHEST = "highest"
ALL = ("tests",)
CONVERSION = (
    "tests/convert",
    "tests/models/families",
    "tests/runtime/common",
    "tests/runtime/compare",
    "tests/runtime/vision",
    "tests/house/test_demo.py",
    "tests/house/test_every_family.py",
)
# package -> what runs on its lowest release: the tests of the rooms that import it
LOWEST = {
    "onnxruntime": CONVERSION,
    "numpy": ALL,
    "onnx": CONVERSION,
    "onnxscript": CONVERSION,
    "tokenizers": (
        "tests/models",
        "tests/runtime/engine",
        "tests/runtime/serve",
        "tests/runtime/test_chat.py",
        "tests/house/test_demo.py",
        "tests/house/test_every_family.py",
    ),
    "transformers": (
        "tests/quant",
        "tests/models",
        "tests/runtime/compare",
        "tests/house/test_every_family.py",
    ),
}
# transformers takes one minor release of tokenizers; the lowest is for those who have neither
WITHOUT_TRANSFORMERS = ("tokenizers",)
NEED_TRANSFORMERS = ("transformers", "msmodelslim")
SHOWN = ("torch", *LOWEST, "msmodelslim")
FAILED, MISSING = 1, 3


@dataclass
class Row:
    """A line of the table: `make` returns the Python of an environment, None where there cannot be
    one; `tests` run in it."""

    name: str
    title: str
    make: Callable[[], str | None]
    tests: tuple[str, ...] = ALL
    versions: str = "missing, or its packages cannot be installed"
    counts: str = "not run"
    code: int = MISSING


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


def is_this(version: str) -> bool:
    return sys.version.startswith(f"{version}.")


def lowest_release(package: str, setup: str) -> str:
    """ "1.20" where setup.py says "onnxruntime>=1.20"."""
    return re.search(rf'"{package}>=([\d.]+)', setup)[1]


def install(python: str, *packages: str) -> bool:
    """Did pip install these, with whatever they need?"""
    options = ("--quiet", "--no-compile", "--disable-pip-version-check")
    command = [python, "-m", "pip", "install", *options, *packages]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def new_environment(name: str, python: str, *options: str) -> str:
    """Path of the Python of an environment in FOLDER."""
    subprocess.run([python, "-m", "venv", *options, FOLDER / name], check=True)
    return str(FOLDER / name / "bin" / "python")


def linked_environment(name: str) -> str:
    """Path of the Python of an environment with the packages of this one. Its files are links to
    the same data: pip removes and replaces files, it does not write into them."""
    made = new_environment(name, sys.executable, "--clear", "--without-pip")
    [packages] = (FOLDER / name).glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    shutil.copytree(here, packages, copy_function=_link, dirs_exist_ok=True)
    return made


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def install_highest(python: str, *more: str) -> bool:
    """The toolkit and all that it needs, at the highest releases that setup.py admits."""
    return install(python, "--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev]", *more)


def on_python(version: str) -> str | None:
    if is_this(version):
        return sys.executable
    python = find_python(version)
    if python is None:
        return None
    made = new_environment(version, python)
    index = os.environ.get("TORCH_INDEX")
    if index and not install(made, "--index-url", index, "torch==2.13.*"):
        return None
    return made if install_highest(made) else None


def on_highest() -> str | None:
    made = linked_environment(HIGHEST)
    return made if install_highest(made) else None


def on_lowest(package: str) -> str | None:
    made = linked_environment(f"lowest-{package}")
    extra = "dev"
    if package in WITHOUT_TRANSFORMERS:
        remove = [made, "-m", "pip", "uninstall", "--quiet", "--yes", *NEED_TRANSFORMERS]
        subprocess.run(remove, check=True)
        extra = "convert,serve"
    release = lowest_release(package, SETUP.read_text(encoding="utf-8"))
    return made if install(made, "-e", f".[{extra}]", f"{package}=={release}") else None


def all_rows() -> list[Row]:
    rows = [Row(version, f"Python {version}", partial(on_python, version)) for version in PYTHONS]
    rows.append(Row(HIGHEST, "highest releases", on_highest))
    for package, tests in LOWEST.items():
        rows.append(Row(package, f"lowest {package}", partial(on_lowest, package), tests))
    return rows


def versions_of(python: str) -> str:
    """Of this environment's Python and packages, as the table shows them."""
    code = (
        "import platform\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "print('Python', platform.python_version(), end='')\n"
        f"for name in {SHOWN}:\n"
        "    try:\n"
        "        print(',', name, version(name), end='')\n"
        "    except PackageNotFoundError:\n"
        "        print(', no', name, end='')\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def run_tests(python: str, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code and its last line, the counts; prints what failed."""
    done = subprocess.run(
        [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-rfE", *arguments],
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


def fill(row: Row, tests: list[str], if_found: bool):
    """Make the row's environment and run its tests, or those that are asked for."""
    if if_found and row.name in PYTHONS and not is_this(row.name) and not find_python(row.name):
        row.versions = "not on this machine"
        row.code = 0
        return
    row.tests = tuple(tests) or row.tests
    try:
        python = row.make()
    except subprocess.CalledProcessError:  # venv or pip has said why
        return
    if python is None:
        return
    row.versions = versions_of(python)
    if row.name == HIGHEST and row.versions == versions_of(sys.executable):
        row.counts = "the releases of this environment, see its Python"
        row.code = 0
        return
    code, row.counts = run_tests(python, list(row.tests))
    row.code = FAILED if code else 0


def main() -> int:
    rows = all_rows()
    names = [row.name for row in rows]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--if-found", action="store_true", help="a missing Python is no error")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, behind --")
    options = parser.parse_args()
    asked = [row for row in rows if row.name in options.only]
    for row in asked:
        print(f"{row.title} ...", flush=True)
        fill(row, options.tests, options.if_found)
        print(
            f"| {row.title} | {row.versions} | {' '.join(row.tests)} | {row.counts} |", flush=True
        )
    codes = {row.code for row in asked}
    return FAILED if FAILED in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
