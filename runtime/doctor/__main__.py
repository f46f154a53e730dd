"""`python -m runtime.doctor`: is everything here that this machine could use, and how to get what
is not.

Takes facts of the machine (checks.py), returns a table or JSON; exit 3 when something for a present
NPU, or a package for the CPU, is missing or does not match.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass

from runtime.ascend import host
from runtime.ascend.host import Host
from runtime.common.errors import MISSING_COMPONENT, run_command
from runtime.common.flags import Parser, flag

from .check import BROKEN, VERSIONS, Check
from .checks import Examination, examine

VARIABLES = (
    "ASCEND_HOME_PATH",
    "ASCEND_TOOLKIT_HOME",
    "ASCEND_OPP_PATH",
    "ATB_HOME_PATH",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTHONPATH",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TASK_QUEUE_ENABLE",
    "INF_NAN_MODE_ENABLE",
    "ASCEND_SLOG_PRINT_TO_STDOUT",
    "OMP_NUM_THREADS",
)
COLOURS = {
    "ok": "green",
    "note": "dim",
    "warning": "yellow",
    "missing": "bold red",
    "mismatch": "bold red",
}


@dataclass(kw_only=True)
class DoctorOptions:
    json: bool = flag(
        "print everything as JSON, for an issue or a script", default=False, kind=bool
    )


def parser() -> Parser:
    return Parser(
        "python -m runtime.doctor",
        "[--json]",
        "Checks drivers, CANN, Python packages and NPUs of this machine against what is known to fit together, "
        "and prints the command that fixes each failure. Exit code 3 when something is missing or does not match.",
        {"output": DoctorOptions},
    )


def main(argv: list[str]) -> int:
    [options] = parser().parse(argv)
    here = host.Host()
    examination = examine(here)
    if options.json:
        print(json.dumps(record(examination, here), indent=2, ensure_ascii=False))
    else:
        show(examination, here)
    return 0 if examination.passed else MISSING_COMPONENT


def verdict(examination: Examination) -> str:
    """What to fix, or what works here."""
    broken = [check.name for check in examination.checks if check.status in BROKEN]
    if broken:
        return f"to mend: {', '.join(broken)}"
    if not examination.has_npu:
        return "CPU only: everything for chat, convert (ONNX), compare is here"
    return "NPU: everything for chat, convert, compare is here"


def record(examination: Examination, host: Host) -> dict:
    """The --json output."""
    free, total = host.memory()
    return {
        "passed": examination.passed,
        "verdict": verdict(examination),
        "machine": platform.platform(),
        "python": sys.executable,
        "memory": {"free": free, "total": total},
        "npu": examination.has_npu,
        "checks": [asdict(check) for check in examination.checks],
        "devices": [{**asdict(device), "soc": device.soc} for device in examination.devices],
        "environment": environment(host),
        "tested": VERSIONS["tested"],
    }


def environment(host: Host) -> dict[str, str]:
    """The variables that decide which CANN and torch_npu are used, those that are set."""
    found = {}
    for name in VARIABLES:
        if name in host.environ:
            found[name] = host.environ[name]
    return found


def show(examination: Examination, host: Host):
    """A table, the variables that are set, and below it the commands to copy, which a table would
    wrap."""
    print(platform.platform())
    try:
        print_table(examination.checks)
    except ModuleNotFoundError:  # rich itself may be what is missing
        for check in examination.checks:
            print(f"{check.name:14}{check.status:10}{check.found}")
    for name, value in environment(host).items():
        print(f"{name}={value}")
    for check in examination.checks:
        if check.fix:
            print(f"{check.status} {check.name}: {check.fix}")
    print(verdict(examination))


def print_table(checks: list[Check]):
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("component", "state", "found")
    for check in checks:
        table.add_row(
            check.name,
            Text(check.status, COLOURS[check.status]),
            Text(check.found, overflow="fold"),
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_command(main))
