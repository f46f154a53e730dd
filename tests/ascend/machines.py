"""Machines with Ascend NPUs as directory trees and answers of `npu-smi`: stand-ins for tests of the
doctor.

Layouts as CANN's installers leave them: `ascend-toolkit/<version>` with a `latest` link up to 8.3,
`cann-<version>` with a `cann` link from 8.5. The tables are those of npu-smi 24 to 26.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from runtime.ascend.host import Host

HBM = """\
+------------------------------------------------------------------------------------------------+
| npu-smi {driver}                   Version: {driver}                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     {chip:<20}| {health:<14}| 88.2        30                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3419 / 65536         |
+===========================+===============+====================================================+
| 1     {chip:<20}| OK            | 87.0        30                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3356/ 65536          |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 1       0                 | 2718348       | python3                  | 57683                   |
+===========================+===============+====================================================+
"""
DDR = """\
+--------------------------------------------------------------------------------------------------------+
| npu-smi {driver}                               Version: {driver}                                   |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 96      {chip:<22}| {health:<16}| NA           46                0     / 0             |
| 0       0                     | 0000:04:00.0    | 0            1836 / 44280                            |
+-------------------------------+-----------------+------------------------------------------------------+
| 96      {chip:<22}| OK              | NA           46                0     / 0             |
| 1       1                     | 0000:04:00.0    | 0            1836 / 43693                            |
+===============================+=================+======================================================+
"""
PAIRED = """\
| NPU   Name                | Health        | Power(W)             Temp(C)                 Hugepages-Usage(page)   |
| Chip  Phy-ID              | Bus-Id        | AICore(%)            Memory-Usage(MB)        HBM-Usage(MB)           |
+===========================+===============+======================================================================+
| 0     Ascend910           | OK            | 162.6                34                      0    / 0                |
| 0     0                   | 0000:9D:00.0  | 0                    0    / 0                3419 / 65536            |
+------------------------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -                    34                      0    / 0                |
| 1     1                   | 0000:9F:00.0  | 0                    0    / 0                2874 / 65536            |
"""
GOOD = {
    "torch": "2.13.0",
    "torch_npu": "2.13.0",
    "aclruntime": "0.0.2",
    "ais_bench": "0.0.2",
    "msmodelslim": "26.1.0",
}


@dataclass
class StandIn(Host):
    """A Host whose commands answer from `answers` (command -> (status, output)) and whose packages
    are `packages`."""

    packages: dict = field(default_factory=dict)
    answers: dict = field(default_factory=dict)
    version_of_python: str = "3.11.9"

    @property
    def python(self):
        return self.version_of_python

    def memory(self):
        return 96 << 30, 128 << 30

    def version(self, package):
        return self.packages.get(package, "1.0" if package not in GOOD else None)

    def run(self, *command, timeout=60):
        script = command[-1]
        kind = (
            "smi"
            if command[0] == "npu-smi"
            else "npu"
            if "torch_npu" in script
            else "om"
            if "aclruntime" in script
            else "torch"
        )
        return self.answers[kind]


def write(path: Path, text: str = ""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def toolkit(root: Path, version: str, kernels: str = "ascend910b") -> str:
    """An installed CANN toolkit; its path as set_env.sh would export it."""
    new = tuple(map(int, version.split(".")[:2])) >= (8, 5)
    home = Path("usr/local/Ascend") / (f"cann-{version}" if new else f"ascend-toolkit/{version}")
    write(
        root / home / "x86_64-linux/ascend_toolkit_install.info",
        f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001C23SPC001B238\narch=x86_64\n",
    )
    for operator in ("add", "matmul") if kernels else ():
        write(root / home / f"opp/built-in/op_impl/ai_core/tbe/kernel/{kernels}/{operator}/a.o")
    write(root / home / "opp/version.info")
    write(root / home / "lib64/libascendcl.so")
    write(root / (home if new else home.parent) / "set_env.sh")
    link = root / "usr/local/Ascend" / ("cann" if new else "ascend-toolkit/latest")
    link.unlink(missing_ok=True)
    link.symlink_to((root / home).name)
    return "/" + str(home)


def sourced(home: str, atb: bool = True) -> dict:
    """What set_env.sh of a toolkit, and of NNAL, exports."""
    found = {
        "ASCEND_HOME_PATH": home,
        "ASCEND_TOOLKIT_HOME": home,
        "ASCEND_OPP_PATH": f"{home}/opp",
        "LD_LIBRARY_PATH": f"{home}/lib64:/usr/local/Ascend/driver/lib64",
    }
    return found | (
        {"ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1"} if atb else {}
    )


def machine(
    root: Path, cann: str = "9.1.0", chip: str = "910B4", driver: str = "26.0.rc1"
) -> StandIn:
    """A machine with two chips on which everything fits."""
    kernels, table = ("ascend310p", DDR) if chip.startswith("310P") else ("ascend910b", HBM)
    for node in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc"):
        write(root / "dev" / node)
    write(
        root / "usr/local/Ascend/driver/version.info",
        f"Version={driver}\nInnerversion=V100R001C23SPC002B212\ncompatible_version_fw=[7.0.0,8.9.9]\n"
        f"package_version={driver}\n",
    )
    write(root / "usr/local/Ascend/firmware/version.info", "Version=7.7.0.1.231\n")
    write(
        root / "usr/local/Ascend/nnal/atb/latest/version.info",
        f"    Ascend-cann-atb : {cann}\n    Ascend-cann-atb Version : {cann}.B020\n    Platform : x86_64\n",
    )
    home = toolkit(root, cann, kernels)
    seen = {"devices": 2, "name": f"Ascend{chip}", "free": 60 << 30}
    answers = {
        "smi": (0, table.format(chip=chip, health="OK", driver=driver)),
        "torch": (0, '{"torch": "2.13.0"}'),
        "npu": (0, f"a warning\n{json.dumps(seen)}\nanother\n"),
        "om": (0, "{}"),
    }
    return StandIn(root, sourced(home), dict(GOOD), answers)
