"""The files of an .om's dump. Takes a directory, returns the first output of every operator.

The device writes one file per operator, `type.name.task.stream.timestamp` (some CANN versions have
fewer or more numbers); `msaccucmp.py convert` makes of it `….output.index[.shape].npy` or `.bin`.
In names, `/`, `.` and blanks have become `_`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.common.errors import ToolkitError

CONVERTED = re.compile(
    r"(?P<type>[\w-]+)\.(?P<name>[\w-]+)\.(?P<numbers>[\d.]+)\.output\.(?P<index>\d+)"
    r"(\.\d+(x\d+)*)?\.(npy|bin)"
)
# as msit dumps an ONNX graph
GOLDEN = re.compile(r"(?P<name>[\w-]+)\.(?P<index>\d+)\.(?P<numbers>\d{10,})\.npy")
RAW = re.compile(r"[\w-]+\.[\w-]+(\.\d+)+")
FLOATS = {2: "float16", 4: "float32", 8: "float64"}  # of a .bin, by the bytes of an element


@dataclass
class DumpedOutput:
    """The first output of an operator. `time`: the largest number of the file's name."""

    name: str
    operator: str
    time: int
    path: Path


def read_dump(dump_dir: Path) -> list[DumpedOutput]:
    """The first output of every operator, of its last run, from all directories below.

    Inputs are left out. ToolkitError if there is no output.
    """
    latest = {}
    for path in sorted(dump_dir.rglob("*")):
        dumped = _parse(path)
        if dumped is None:
            continue
        earlier = latest.get(dumped.name)
        if earlier is None or dumped.time >= earlier.time:
            latest[dumped.name] = dumped
    if not latest:
        raise ToolkitError(_why_empty(dump_dir))
    return list(latest.values())


def _parse(path: Path) -> DumpedOutput | None:
    """None for a file that is no operator's first output."""
    named = CONVERTED.fullmatch(path.name) or GOLDEN.fullmatch(path.name)
    if named is None or int(named["index"]) != 0:
        return None
    operator = named.groupdict().get("type", "")
    time = max(map(int, named["numbers"].split(".")))
    return DumpedOutput(named["name"], operator, time, path)


def _why_empty(dump_dir: Path) -> str:
    raw = None
    for path in sorted(dump_dir.rglob("*")):
        if RAW.fullmatch(path.name) and path.is_file():
            raw = path
    if raw:
        return (
            f"{raw} is as the device wrote it; make npy files with `python3 $ASCEND_TOOLKIT_HOME/tools/"
            f"operator_cmp/compare/msaccucmp.py convert -d {raw.parent} -out NEW` and give --dump NEW"
        )
    return (
        f"--dump {dump_dir} has no file like TYPE.NAME.TASK.STREAM.TIMESTAMP.output.0.npy; give the folder "
        "that msaccucmp.py convert wrote"
    )


def in_file_names(name: str) -> str:
    """A node's name as the device writes it into file names."""
    return re.sub(r"[./\\ ]", "_", name)


def load_values(path: Path, size: int) -> np.ndarray:
    """The dumped array; `size` (elements expected) tells the dtype of a .bin, which is flat."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    element = path.stat().st_size // max(size, 1)
    return np.fromfile(path, FLOATS.get(element, "uint8"))
