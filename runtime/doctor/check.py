"""What every check of `runtime.doctor` returns, and what several of them share.

Takes a component, a status and the command that fixes it, returns a Check. Versions are compared
with the table in versions.json.
"""

import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path

OK = "ok"
NOTE = "note"
WARNING = "warning"
MISSING = "missing"
MISMATCH = "mismatch"
BROKEN = (MISSING, MISMATCH)
VERSIONS = json.loads(Path(__file__).with_name("versions.json").read_text(encoding="utf-8"))
ARCH = platform.machine()
DOWNLOADS = "from hiascend.com/cann/download"


@dataclass(frozen=True)
class Check:
    """`fix`: the shell command that fixes it, for anything but "ok" and some notes."""

    name: str
    status: str
    found: str
    fix: str = ""


def reason(output: str) -> str:
    """The line of a failed command that says why: one about a library, else the last one."""
    last = "no output"
    for line in output.splitlines():
        if re.search(r"Error: .*\.so", line):
            return line.strip()
        if line.strip():
            last = line.strip()
    return last
