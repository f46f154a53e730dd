"""What this machine has of Ascend: takes its files and the output of `npu-smi`, returns facts.

Reads only; nothing is imported or loaded. Paths, environment and commands go through a Host, so
that a test can stand a directory tree in for a machine.
"""

import glob
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.common import machine

from .cann import HOMES, Toolkit, read_info, toolkit_in

DEVICE = re.compile(r"(\d+)\s+([A-Za-z]*\d\S*)")
BUS = re.compile(r"[\dA-Fa-fx]{4}:[\dA-Fa-fx]{2}:[\dA-Fa-fx]{2}\.\w|NA")
USED_OF_TOTAL = re.compile(r"(\d+)\s*/\s*(\d+)")
HUAWEI, ACCELERATOR = "0x19e5", "0x1200"  # PCI vendor; class of processing accelerators
TOOLKITS = (
    "usr/local/Ascend/ascend-toolkit/latest",
    "usr/local/Ascend/ascend-toolkit/*.*",
    "usr/local/Ascend/cann",
    "usr/local/Ascend/cann-*",
)

WHEELS = "https://aisbench.obs.myhuaweicloud.com/packet/ais_bench_infer/0.0.2/ait/"
SOURCES = (
    "git+https://gitee.com/ascend/tools.git#egg={}&subdirectory=ais-bench_workload/tool/ais_bench{}"
)
NEWEST_WHEEL = (3, 10)


def npu_nodes(root: str | Path = "/") -> list[str]:
    """Device files of the NPUs this process may see: ["/dev/davinci0", ...]."""
    nodes = glob.glob(f"{root}/dev/davinci*".replace("//", "/"))
    return sorted(node for node in nodes if node[-1].isdigit())


@dataclass(frozen=True)
class Device:
    """One chip as `npu-smi info` lists it; memory in MB, of HBM where there is some."""

    npu: int
    chip: int
    name: str
    health: str
    used: int
    total: int

    @property
    def soc(self) -> str:
        """Name that atc takes; "Ascend910" alone hides which A3 it is (`npu-smi info -t board`
        shows it)."""
        return "Ascend" + self.name.removeprefix("Ascend")


def parse_npu_smi(text: str) -> list[Device]:
    """Devices in the table of `npu-smi info`: two rows each, in the layouts of 21.0 to 26.0."""
    devices = []
    head = None  # (npu, name, health) of a first row that waits for its second
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            continue
        named = DEVICE.fullmatch(cells[0])
        if named and not BUS.fullmatch(cells[1]):
            head = (int(named[1]), named[2], cells[1])
        elif head and BUS.fullmatch(cells[1]):
            npu, name, health = head
            used, total = _memory(cells[2])
            devices.append(Device(npu, int(cells[0].split()[0]), name, health, used, total))
            head = None
    return devices


def _memory(cell: str) -> tuple[int, int]:
    """(used, total) MB in a cell of "used / total" pairs: of the last two the one with the larger
    total, for HBM stands behind a memory of 0."""
    pairs = [(int(used), int(total)) for used, total in USED_OF_TOTAL.findall(cell)]
    return max(pairs[-2:], key=lambda pair: (pair[1], pair[0]), default=(0, 0))


@dataclass
class Host:
    """This machine, or a tree that stands in for one."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")

    def info(self, absolute: str) -> dict[str, str]:
        """Pairs of a version.info file ("key=value" or "key : value"), {} without it."""
        return read_info(self.path(absolute))

    def run(self, *command: str, timeout: float = 60) -> tuple[int, str]:
        """(exit status, output) of a command, ended after `timeout` seconds.

        127 when there is none of that name, 126 when it cannot be run, 124 when it takes too long.
        """
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            return 127, f"{command[0]} is not there"
        except OSError as error:
            return 126, str(error)
        except subprocess.TimeoutExpired:
            return 124, f"{command[0]} gave no answer in {timeout:.0f} s"
        return done.returncode, done.stdout + done.stderr

    def version(self, package: str) -> str | None:
        """Version of an installed Python package, None without it."""
        return machine.version(package)

    @property
    def python(self) -> str:
        return platform.python_version()

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the host."""
        return machine.memory(self.root)

    def cards(self) -> int:
        """Ascend cards on the PCI bus, with or without a driver."""
        found = 0
        for vendor in self.root.glob("sys/bus/pci/devices/*/vendor"):
            kind = vendor.with_name("class")
            if vendor.read_text().strip() != HUAWEI or not kind.is_file():
                continue
            if kind.read_text().startswith(ACCELERATOR):
                found += 1
        return found

    def toolkits(self) -> list[Toolkit]:
        """Installed CANN toolkits, each once, the one the environment points to first."""
        folders = [self.path(self.environ[name]) for name in HOMES if self.environ.get(name)]
        for pattern in TOOLKITS:
            folders += sorted(self.root.glob(pattern))
        found = {}
        for folder in folders:
            toolkit = toolkit_in(folder)
            if toolkit:
                found.setdefault(folder.resolve(), toolkit)
        return list(found.values())


def install_ais_bench() -> str:
    """The pip line for this Python and machine: Huawei's wheels, or the sources where there is
    none."""
    if sys.version_info[:2] > NEWEST_WHEEL:
        aclruntime = SOURCES.format("aclruntime", "/backend")
        ais_bench = SOURCES.format("ais_bench", "")
        return f"pip install '{aclruntime}' '{ais_bench}'"
    tag = "cp{}{}".format(*sys.version_info[:2])
    return (
        f"pip install {WHEELS}aclruntime-0.0.2-{tag}-{tag}-linux_{platform.machine()}.whl "
        f"{WHEELS}ais_bench-0.0.2-py3-none-any.whl"
    )
