"""Checks of Python and its packages.

Takes a Host (and the CANN toolkit in use), returns a Check each. torch and torch_npu are never
imported here: without CANN even `import torch` may fail, so a child process tries it.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator

from runtime.ascend.cann import Toolkit, numbers
from runtime.ascend.host import Host, install_ais_bench
from runtime.common.broken_imports import preload_line

from .cann import toolkit_install
from .check import MISMATCH, MISSING, NOTE, OK, VERSIONS, WARNING, Check, reason

PROBE_TORCH = "import json, torch; print(json.dumps({'torch': torch.__version__}))"
PROBE_NPU = """import json, torch, torch_npu
print(json.dumps({"devices": torch.npu.device_count(), "name": torch.npu.get_device_name(0),
                  "free": torch.npu.mem_get_info(0)[0]}))"""
PROBE_OM = "import aclruntime; from ais_bench.infer.interface import InferSession; print('{}')"
PROBE_SECONDS = 120
NO_AUTOLOAD = "export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # torch_npu is installed, CANN is not"
SOURCE_CANN = "source {set_env}"
# what a failed import prints -> the command that fixes it
CAUSES = {
    r"libatb\.so": "source /usr/local/Ascend/nnal/atb/set_env.sh",
    r"undefined symbol": "pip install torch_npu=={torch_npu}   "
    "# built for another torch, CANN or NNAL than is installed",
    r"lib\w+\.so[.\d]*: cannot open": SOURCE_CANN,
    r"507033|acl open device|gave no answer": "npu-smi info   "
    "# the driver does not answer; restart the machine",
}


def python(host: Host) -> Check:
    minor = ".".join(host.python.split(".")[:2])
    if minor in VERSIONS["python"]:
        return Check("Python", OK, host.python)
    fix = f"make setup PYTHON=python{VERSIONS['python'][1]}"
    return Check("Python", MISMATCH, host.python, fix)


def required(host: Host) -> Iterator[Check]:
    """The packages without which nothing runs."""
    missing = [name for name in VERSIONS["packages"] if host.version(name) is None]
    if missing:
        yield Check("packages", MISSING, ", ".join(missing), "make setup   # or: pip install -e .")
    for name in ("onnx", "onnxruntime"):
        version = host.version(name)
        if version:
            yield Check(name, OK, version)


def torch(host: Host, toolkit: Toolkit | None) -> Check:
    """Whether `import torch` works, which torch_npu without CANN prevents, and its version."""
    version = host.version("torch")
    install = f"pip install 'torch=={VERSIONS['torch']}.*'"
    if version is None:
        return Check("torch", MISSING, "not installed", install)
    code, output = host.run(sys.executable, "-c", PROBE_TORCH, timeout=PROBE_SECONDS)
    if code:
        fix = NO_AUTOLOAD
        if toolkit or not host.version("torch_npu"):
            fix = _fix_import(output, toolkit)
        return Check("torch", MISSING, f"{version} cannot be imported: {reason(output)}", fix)
    lowest, highest = map(numbers, VERSIONS["torch_range"])
    if not lowest <= numbers(version)[:2] <= highest:
        return Check("torch", MISMATCH, version, install)
    if numbers(version)[:2] != numbers(VERSIONS["torch"]):
        return Check("torch", NOTE, f"{version} decodes; only torch {VERSIONS['torch']} converts")
    return Check("torch", OK, version)


def torch_npu(host: Host, toolkit: Toolkit | None) -> Check:
    """Whether it suits torch and CANN, and opens the NPU."""
    version = host.version("torch_npu")
    torch_version = host.version("torch") or ""
    install = f"pip install torch_npu=={_torch_npu_for(torch_version)}"
    if version is None:
        return Check("torch_npu", MISSING, "not installed", install)
    if numbers(version)[:2] != numbers(torch_version)[:2]:
        found = f"{version} for torch {torch_version}; the first two numbers must be the same"
        return Check("torch_npu", MISMATCH, found, install)
    cann = VERSIONS["published"].get(version.split("+")[0], "")
    if not cann or toolkit is None:
        return _open_npu(host, toolkit, version)
    released_for = f", released for CANN {cann}, here is {toolkit.version}"
    if numbers(toolkit.version)[:2] < numbers(cann):
        fix = toolkit_install(f"{cann}.<x>")
        return Check("torch_npu", MISMATCH, version + released_for, fix)
    opened = _open_npu(host, toolkit, version)
    if opened.status == OK and numbers(toolkit.version)[:2] != numbers(cann):
        return Check("torch_npu", WARNING, opened.found + released_for)
    return opened


def _torch_npu_for(torch_version: str) -> str:
    """The tested release for this torch, else the one that goes with the torch to install."""
    for torch_npu_version, tested_torch in VERSIONS["tested"].items():
        if numbers(tested_torch)[:2] == numbers(torch_version)[:2]:
            return torch_npu_version
    return VERSIONS["torch_npu"]


def _open_npu(host: Host, toolkit: Toolkit | None, version: str) -> Check:
    """Whether torch_npu of this version finds an NPU in a process of its own."""
    code, output = host.run(sys.executable, "-c", PROBE_NPU, timeout=PROBE_SECONDS)
    if code:
        found = f"{version} cannot open the NPU: {reason(output)}"
        return Check("torch_npu", MISMATCH, found, _fix_import(output, toolkit))
    return Check("torch_npu", OK, f"{version}: {_npus_seen(output)}")


def _npus_seen(output: str) -> str:
    """What PROBE_NPU prints, among warnings."""
    seen = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return f"{seen['devices']} x {seen['name']}, {seen['free'] / 2**30:.1f} GiB free"


def ais_bench(host: Host, toolkit: Toolkit | None) -> Check:
    """aclruntime and ais_bench, which run an .om."""
    aclruntime = host.version("aclruntime")
    tool = host.version("ais_bench")
    found = f"aclruntime {aclruntime or 'not installed'}, ais_bench {tool or 'not installed'}"
    if aclruntime is None or tool is None:
        fix = install_ais_bench()
        return Check("ais_bench", MISSING, f"{found} (vision om needs both)", fix)
    code, output = host.run(sys.executable, "-c", PROBE_OM, timeout=PROBE_SECONDS)
    if code:
        fix = _fix_import(output, toolkit)
        if "No module named" in output:
            fix = install_ais_bench()
        return Check("ais_bench", MISMATCH, f"{found}: {reason(output)}", fix)
    return Check("ais_bench", OK, found)


def msmodelslim(host: Host) -> Check:
    version = host.version("msmodelslim")
    if version:
        return Check("msmodelslim", OK, version)
    found = "not installed (only some ways to quantise need it)"
    return Check("msmodelslim", NOTE, found, "pip install msmodelslim")


def _fix_import(output: str, toolkit: Toolkit | None) -> str:
    """The command that fixes an import which failed with this output."""
    if line := preload_line(output):
        return line
    values = {
        "torch_npu": VERSIONS["torch_npu"],
        "set_env": "/usr/local/Ascend/cann/set_env.sh",
    }
    if toolkit:
        values["set_env"] = shlex.quote(str(toolkit.set_env))
    for pattern, fix in CAUSES.items():
        if re.search(pattern, output):
            return fix.format(**values)
    return SOURCE_CANN.format(**values)
