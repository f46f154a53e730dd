"""What of Ascend this machine has, as its files and `npu-smi` tell it. Reads only; nothing is imported or loaded.

Paths, environment and commands go through a Host, so that a test can stand a directory tree in for a machine.
"""

import glob
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

DEVICE = re.compile(r"(\d+)\s+([A-Za-z]*\d\S*)")
BUS = re.compile(r"[\dA-Fa-fx]{4}:[\dA-Fa-fx]{2}:[\dA-Fa-fx]{2}\.\w|NA")
HUAWEI, ACCELERATOR = "0x19e5", "0x1200"  # PCI vendor; class of processing accelerators
TOOLKITS = (
    "usr/local/Ascend/ascend-toolkit/latest",
    "usr/local/Ascend/ascend-toolkit/*.*",
    "usr/local/Ascend/cann",
    "usr/local/Ascend/cann-*",
)
HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")

WHEELS = "https://aisbench.obs.myhuaweicloud.com/packet/ais_bench_infer/0.0.2/ait/"
SOURCES = (
    "git+https://gitee.com/ascend/tools.git#egg={}&subdirectory=ais-bench_workload/tool/ais_bench{}"
)
NEWEST_WHEEL = (3, 10)


def npu_nodes(root: str | Path = "/") -> list[str]:
    """Device files of the NPUs this process may see: ["/dev/davinci0", ...]."""
    return sorted(
        node for node in glob.glob(f"{root}/dev/davinci*".replace("//", "/")) if node[-1].isdigit()
    )


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
        """Name that atc takes; "Ascend910" alone hides which A3 it is (`npu-smi info -t board` tells)."""
        return "Ascend" + self.name.removeprefix("Ascend")


def parse_npu_smi(text: str) -> list[Device]:
    """Devices in the table of `npu-smi info`: two rows each, in the layouts of 21.0 to 26.0."""
    devices = []
    head = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            continue
        named = DEVICE.fullmatch(cells[0])
        if named and not BUS.fullmatch(cells[1]):
            head = int(named[1]), named[2], cells[1]
        elif head and BUS.fullmatch(cells[1]):
            memory = [
                (int(total), int(used))
                for used, total in re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
            ]
            total, used = max(memory[-2:], default=(0, 0))
            devices.append(Device(head[0], int(cells[0].split()[0]), head[1], head[2], used, total))
            head = None
    return devices


@dataclass(frozen=True)
class Toolkit:
    """One installed CANN toolkit. `info`: its ascend_toolkit_install.info."""

    path: Path
    info: Mapping[str, str]

    @property
    def version(self) -> str:
        return self.info.get("version", "")

    @property
    def set_env(self) -> Path:
        """set_env.sh lies inside a `cann` folder, and beside the version folders of an `ascend-toolkit`."""
        inside = self.path / "set_env.sh"
        return (
            inside
            if inside.is_file() or self.path.parent.name != "ascend-toolkit"
            else self.path.parent / "set_env.sh"
        )


@dataclass
class Host:
    """This machine, or a tree that stands in for one."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")

    def info(self, absolute: str) -> dict[str, str]:
        """Pairs of a version.info file ("key=value" or "key : value"), {} without it."""
        try:
            lines = self.path(absolute).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return {}
        pairs = (re.split(r"\s*[=:]\s*", line.strip(), maxsplit=1) for line in lines)
        return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}

    def run(self, *command: str, timeout: float = 60) -> tuple[int, str]:
        """(exit status, output) of a command; 127 when there is none of that name, 124 when it takes too long."""
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
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    @property
    def python(self) -> str:
        return platform.python_version()

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the host."""
        info = self.info("/proc/meminfo")
        return tuple(int(info[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))

    def cards(self) -> int:
        """Ascend cards on the PCI bus, with or without a driver."""
        found = 0
        for vendor in self.root.glob("sys/bus/pci/devices/*/vendor"):
            kind = vendor.with_name("class")
            found += (
                vendor.read_text().strip() == HUAWEI
                and kind.is_file()
                and kind.read_text().startswith(ACCELERATOR)
            )
        return found

    def toolkits(self) -> list[Toolkit]:
        """Installed CANN toolkits, each once, the one the environment points to first."""
        named = [self.path(self.environ[name]) for name in HOMES if self.environ.get(name)]
        found = {}
        for path in (
            *named,
            *(path for pattern in TOOLKITS for path in sorted(self.root.glob(pattern))),
        ):
            infos = sorted(path.glob("*-linux/ascend_toolkit_install.info"))
            if infos:
                found.setdefault(
                    path.resolve(), Toolkit(path, self.info(str(infos[0].relative_to(self.root))))
                )
        return list(found.values())


def numbers(version: str) -> tuple[int, ...]:
    """ "8.3.RC1" -> (8, 3), "7.7.0.1.231" -> (7, 7, 0, 1, 231): the leading numbers, to compare versions."""
    leading = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, leading[0].split("."))) if leading else ()


def install_ais_bench() -> str:
    """The pip line for this Python and machine: Huawei's wheels, or the sources where there is none."""
    if sys.version_info[:2] > NEWEST_WHEEL:
        return f"pip install '{SOURCES.format('aclruntime', '/backend')}' '{SOURCES.format('ais_bench', '')}'"
    tag = "cp{}{}".format(*sys.version_info[:2])
    return (
        f"pip install {WHEELS}aclruntime-0.0.2-{tag}-{tag}-linux_{platform.machine()}.whl "
        f"{WHEELS}ais_bench-0.0.2-py3-none-any.whl"
    )
