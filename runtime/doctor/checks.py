"""The checks of `runtime.doctor`: facts of a Host in, one Check per component out, each failure with the line that mends it.

Versions are compared with the table in versions.json. torch and torch_npu are never imported here: without CANN even
`import torch` may fail, so a child process tries it.
"""

import json
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.ascend.cann import Toolkit, numbers
from runtime.ascend.host import Device, Host, install_ais_bench, npu_nodes, parse_npu_smi

OK = "ok"
NOTE = "note"
WARNING = "warning"
MISSING = "missing"
MISMATCH = "mismatch"
BROKEN = (MISSING, MISMATCH)
VERSIONS = json.loads(Path(__file__).with_name("versions.json").read_text(encoding="utf-8"))
ARCH = platform.machine()
DOWNLOADS = "from hiascend.com/cann/download"
PROBE_TORCH = "import json, torch; print(json.dumps({'torch': torch.__version__}))"
PROBE_NPU = """import json, torch, torch_npu
print(json.dumps({"devices": torch.npu.device_count(), "name": torch.npu.get_device_name(0),
                  "free": torch.npu.mem_get_info(0)[0]}))"""
PROBE_OM = "import aclruntime; from ais_bench.infer.interface import InferSession; print('{}')"
PROBE_SECONDS = 120
NODES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
CAUSES = (  # what a failed import says -> the line that mends it
    (r"static TLS block", "export LD_PRELOAD={library}"),
    (r"libatb\.so", "source /usr/local/Ascend/nnal/atb/set_env.sh"),
    (
        r"undefined symbol",
        "pip install torch_npu=={torch_npu}   # built for another torch, CANN or NNAL than is installed",
    ),
    (r"lib\w+\.so[.\d]*: cannot open", "source {set_env}"),
    (
        r"507033|acl open device|gave no answer",
        "npu-smi info   # the driver does not answer; restart the machine",
    ),
)


@dataclass(frozen=True)
class Check:
    """`fix`: the shell line that mends it, for anything but "ok" and some notes."""

    name: str
    status: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Examination:
    checks: list[Check]
    devices: list[Device]
    has_npu: bool

    @property
    def passed(self) -> bool:
        return not any(check.status in BROKEN for check in self.checks)


def examine(host: Host) -> Examination:
    """Everything that can be seen; of a machine without an NPU what is missing for one does not count."""
    nodes = npu_nodes(host.root)
    cards = host.cards()
    devices, smi = _smi(host)
    has_npu = bool(nodes or cards or devices)
    checks = [_python(host), _memory(host), *_packages(host)]
    if not has_npu:
        found = [toolkit.version for toolkit in host.toolkits()]
        checks += (
            [Check("CANN toolkit", OK, f"{', '.join(found)} (for atc; no NPU needed)")]
            if found
            else []
        )
        return Examination([*checks, _torch(host, None)], [], False)
    chips = sorted({VERSIONS["chips"].get(device.name, "") for device in devices} - {""})
    toolkit = _active(host)
    checks += [
        _nodes(host, nodes, cards),
        _driver(host, chips),
        _firmware(host),
        smi,
        *map(_health, devices),
        *_toolkit(host, toolkit, chips),
        _atb(host, toolkit, chips),
        _torch(host, toolkit),
        _torch_npu(host, toolkit),
        _ais_bench(host, toolkit),
        _msmodelslim(host),
    ]
    return Examination(checks, devices, True)


# Python packages


def _python(host) -> Check:
    version = host.python
    fits = ".".join(version.split(".")[:2]) in VERSIONS["python"]
    return Check(
        "Python",
        OK if fits else MISMATCH,
        version,
        "" if fits else f"make setup PYTHON=python{VERSIONS['python'][1]}",
    )


def _memory(host) -> Check:
    free, total = (size / 2**30 for size in host.memory())
    return Check("memory", OK, f"{free:.1f} of {total:.1f} GiB free")


def _packages(host):
    missing = [name for name in VERSIONS["packages"] if host.version(name) is None]
    if missing:
        yield Check("packages", MISSING, ", ".join(missing), "make setup   # or: pip install -e .")
    yield from (
        Check(name, OK, host.version(name))
        for name in ("onnx", "onnxruntime")
        if host.version(name)
    )


def _torch(host, toolkit) -> Check:
    """Whether `import torch` works, which torch_npu without CANN prevents, and its version."""
    version = host.version("torch")
    if version is None:
        return Check(
            "torch", MISSING, "not installed", f"pip install 'torch=={VERSIONS['torch']}.*'"
        )
    code, output = host.run(sys.executable, "-c", PROBE_TORCH, timeout=PROBE_SECONDS)
    if code:
        fix = (
            _fix_import(output, toolkit)
            if toolkit or not host.version("torch_npu")
            else "export TORCH_DEVICE_BACKEND_AUTOLOAD=0   # torch_npu is installed, CANN is not"
        )
        return Check("torch", MISSING, f"{version} cannot be imported: {_reason(output)}", fix)
    fits = numbers(version)[:2] == numbers(VERSIONS["torch"])
    return Check(
        "torch",
        OK if fits else MISMATCH,
        version,
        "" if fits else f"pip install 'torch=={VERSIONS['torch']}.*'",
    )


def _torch_npu(host, toolkit) -> Check:
    version = host.version("torch_npu")
    torch = host.version("torch") or ""
    install = f"pip install torch_npu=={VERSIONS['torch_npu']}"
    if version is None:
        return Check("torch_npu", MISSING, "not installed", install)
    if numbers(version)[:2] != numbers(torch)[:2]:
        return Check(
            "torch_npu",
            MISMATCH,
            f"{version} for torch {torch}; the first two numbers must be the same",
            install,
        )
    cann = VERSIONS["published"].get(version.split("+")[0], "")
    apart = bool(cann and toolkit) and f", released for CANN {cann}, here is {toolkit.version}"
    if apart and numbers(toolkit.version)[:2] < numbers(cann):
        return Check("torch_npu", MISMATCH, version + apart, _toolkit_install(cann + ".<x>"))
    code, output = host.run(sys.executable, "-c", PROBE_NPU, timeout=PROBE_SECONDS)
    if code:
        return Check(
            "torch_npu",
            MISMATCH,
            f"{version} cannot open the NPU: {_reason(output)}",
            _fix_import(output, toolkit),
        )
    seen = json.loads(
        next(line for line in output.splitlines() if line.startswith("{"))
    )  # among warnings
    found = f"{version}: {seen['devices']} x {seen['name']}, {seen['free'] / 2**30:.1f} GiB free"
    if apart and numbers(toolkit.version)[:2] != numbers(cann):
        return Check("torch_npu", WARNING, found + apart)
    return Check("torch_npu", OK, found)


def _ais_bench(host, toolkit) -> Check:
    versions = [
        f"{name} {host.version(name) or 'not installed'}" for name in ("aclruntime", "ais_bench")
    ]
    install = install_ais_bench()
    if host.version("aclruntime") is None or host.version("ais_bench") is None:
        return Check("ais_bench", MISSING, f"{', '.join(versions)} (vision om needs both)", install)
    code, output = host.run(sys.executable, "-c", PROBE_OM, timeout=PROBE_SECONDS)
    if code:
        return Check(
            "ais_bench",
            MISMATCH,
            f"{', '.join(versions)}: {_reason(output)}",
            install if "No module named" in output else _fix_import(output, toolkit),
        )
    return Check("ais_bench", OK, ", ".join(versions))


def _msmodelslim(host) -> Check:
    version = host.version("msmodelslim")
    return (
        Check("msmodelslim", OK, version)
        if version
        else Check(
            "msmodelslim",
            NOTE,
            "not installed (only some ways to quantise need it)",
            "pip install msmodelslim",
        )
    )


def _fix_import(output: str, toolkit: Toolkit | None) -> str:
    library = re.search(r"(/\S*libgomp\S*?):", output)
    values = {
        "library": library[1] if library else "/usr/lib/aarch64-linux-gnu/libgomp.so.1",
        "torch_npu": VERSIONS["torch_npu"],
        "set_env": toolkit.set_env if toolkit else "/usr/local/Ascend/cann/set_env.sh",
    }
    found = [line for pattern, line in CAUSES if re.search(pattern, output)]
    return (found[0] if found else "source {set_env}").format(**values)


def _reason(output: str) -> str:
    """The line that says why: one about a library, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next(
        (line for line in lines if re.search(r"Error: .*\.so", line)),
        lines[-1] if lines else "no output",
    )


# driver and devices


def _nodes(host, nodes, cards) -> Check:
    missing = [node for node in NODES if not host.path(node).exists()]
    if not nodes or missing:
        what = f"{cards} cards on the PCI bus, " if cards else ""
        return Check(
            "device files",
            MISSING,
            f"{what}missing: {', '.join(([] if nodes else ['/dev/davinci*']) + missing)}",
            f"docker run --device /dev/davinci0 {' '.join('--device ' + node for node in NODES)} ...   # in a "
            f"container; else install the driver {DOWNLOADS}",
        )
    locked = [
        node
        for node in (*nodes, *map(str, map(host.path, NODES)))
        if not os.access(node, os.R_OK | os.W_OK)
    ]
    if locked:
        return Check(
            "device files",
            MISMATCH,
            f"no permission for {', '.join(locked)}",
            "sudo usermod -aG HwHiAiUser $USER   # then log in again",
        )
    return Check("device files", OK, f"{len(nodes)} NPUs")


def _driver(host, chips) -> Check:
    info = host.info("/usr/local/Ascend/driver/version.info")
    chip = chips[0].removeprefix("ascend") if chips else "<chip>"
    if not info:
        return Check(
            "driver",
            MISSING,
            "/usr/local/Ascend/driver/version.info is not there",
            f"sudo ./Ascend-hdk-{chip}-npu-driver_<version>_linux-{ARCH}.run --full   # in a container instead: "
            "docker run -v /usr/local/Ascend/driver:/usr/local/Ascend/driver",
        )
    return Check(
        "driver", OK, info.get("package_version") or info.get("Version", "of unknown version")
    )


def _firmware(host) -> Check:
    version = host.info("/usr/local/Ascend/firmware/version.info").get("Version")
    span = re.findall(
        r"[\d.]+",
        host.info("/usr/local/Ascend/driver/version.info").get("compatible_version_fw", ""),
    )
    if version is None:
        return Check("firmware", NOTE, "not told here (containers do not see it)")
    if len(span) == 2 and not numbers(span[0]) <= numbers(version)[:3] <= numbers(span[1]):
        return Check(
            "firmware",
            MISMATCH,
            f"{version}, the driver takes {span[0]} to {span[1]}",
            "sudo ./Ascend-hdk-<chip>-npu-firmware_<version of the driver>.run --full   # then restart the machine",
        )
    return Check("firmware", OK, version)


def _smi(host) -> tuple[list[Device], Check]:
    code, output = host.run("npu-smi", "info", timeout=30)
    devices = parse_npu_smi(output) if code == 0 else []
    if devices:
        return devices, Check(
            "npu-smi", OK, f"{len(devices)} chips: {', '.join(sorted({d.soc for d in devices}))}"
        )
    fix = (
        "docker run -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi -v /usr/local/dcmi:/usr/local/dcmi ...   # in a "
        "container; else install the driver"
        if code == 127
        else "sudo npu-smi info   # if that works: sudo usermod -aG HwHiAiUser $USER; else restart the machine"
    )
    return [], Check("npu-smi", MISSING, _reason(output), fix)


def _health(device: Device) -> Check:
    free = device.total - device.used
    name = f"npu {device.npu} chip {device.chip}"
    found = f"{device.soc}, {free:,} of {device.total:,} MB free"
    if device.health != "OK":
        return Check(
            name,
            MISMATCH,
            f"{found}, health {device.health}",
            f"npu-smi info -t health -i {device.npu}",
        )
    if device.name not in VERSIONS["chips"]:
        return Check(
            name, WARNING, f"{found}; not one of {', '.join(VERSIONS['chips'])}", "--device cpu"
        )
    return Check(name, OK, found)


# CANN


def _active(host) -> Toolkit | None:
    """The toolkit the environment points to, else the newest one installed."""
    toolkits = host.toolkits()
    if any(host.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")):
        return next(iter(toolkits), None)
    return max(toolkits, key=lambda toolkit: numbers(toolkit.version), default=None)


def _toolkit_install(version: str) -> str:
    return f"./Ascend-cann-toolkit_{version}_linux-{ARCH}.run --install   # {DOWNLOADS}"


def _toolkit(host, toolkit, chips):
    if toolkit is None:
        return [Check("CANN toolkit", MISSING, "none found", _toolkit_install("<version>"))]
    others = [
        other.version for other in host.toolkits() if other.path.resolve() != toolkit.path.resolve()
    ]
    found = f"{toolkit.version} in {toolkit.path}" + (
        f" (also here: {', '.join(others)})" if others else ""
    )
    return [
        Check("CANN toolkit", OK, found),
        _environment(host, toolkit),
        *(_kernels(toolkit, chip) for chip in chips),
    ]


def _environment(host, toolkit) -> Check:
    """Whether set_env.sh of that toolkit, and of no other, was sourced in this shell."""
    fix = f"source {toolkit.set_env}"
    home = host.environ.get("ASCEND_HOME_PATH") or host.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        return Check("environment", MISMATCH, "set_env.sh was not sourced in this shell", fix)
    if not host.path(home).exists():
        return Check(
            "environment", MISMATCH, f"ASCEND_HOME_PATH is {home}, which is not there", fix
        )
    libraries = [
        host.path(part).resolve()
        for part in host.environ.get("LD_LIBRARY_PATH", "").split(":")
        if part
    ]
    if not any(path.is_relative_to(toolkit.path.resolve()) for path in libraries):
        return Check("environment", MISMATCH, f"LD_LIBRARY_PATH has nothing of {home}", fix)
    mixed = [
        other.version
        for other in host.toolkits()
        if other.path.resolve() != toolkit.path.resolve()
        and any(path.is_relative_to(other.path.resolve()) for path in libraries)
    ]
    if mixed:
        return Check(
            "environment",
            MISMATCH,
            f"LD_LIBRARY_PATH mixes CANN {toolkit.version} with {', '.join(mixed)}",
            f"env -u LD_LIBRARY_PATH bash -l   # then: {fix}",
        )
    opp = host.environ.get("ASCEND_OPP_PATH", "")
    if not opp or not host.path(opp).exists():
        return Check("environment", MISMATCH, f"ASCEND_OPP_PATH is {opp or 'not set'}", fix)
    return Check("environment", OK, f"set_env.sh of {home}")


def _kernels(toolkit, chip) -> Check:
    """The operator package of the chip is installed apart from the toolkit; without it every operator fails (561103)."""
    folder = toolkit.path / "opp/built-in/op_impl/ai_core/tbe/kernel" / chip
    short = chip.removeprefix("ascend")
    version = toolkit.version
    if folder.is_dir() and len(list(folder.iterdir())) > 1:
        return Check("CANN kernels", OK, f"for {chip}")
    name = (
        f"Ascend-cann-{short}-ops" if numbers(version) >= (8, 5) else f"Ascend-cann-kernels-{short}"
    )
    return Check(
        "CANN kernels",
        MISSING,
        f"none for {chip} in {folder}",
        f"./{name}_{version}_linux-{ARCH}.run --install",
    )


def _atb(host, toolkit, chips) -> Check:
    home = host.environ.get("ATB_HOME_PATH", "")
    version = host.info("/usr/local/Ascend/nnal/atb/latest/version.info").get("Ascend-cann-atb")
    needed = bool(set(chips) & set(VERSIONS["needs_atb"]))
    cann = toolkit.version if toolkit else "<version>"
    if version is None and not home:
        return Check(
            "NNAL (ATB)",
            MISSING if needed else NOTE,
            "not installed" + ("" if needed else " (310P needs it)"),
            f"./Ascend-cann-nnal_{cann}_linux-{ARCH}.run --install",
        )
    if toolkit and version and numbers(version)[:2] != numbers(toolkit.version)[:2]:
        return Check(
            "NNAL (ATB)",
            MISMATCH if needed else WARNING,
            f"{version} beside CANN {toolkit.version}",
            f"./Ascend-cann-nnal_{toolkit.version}_linux-{ARCH}.run --install",
        )
    if not home:
        return Check(
            "NNAL (ATB)",
            MISMATCH if needed else NOTE,
            f"{version}, its set_env.sh was not sourced",
            "source /usr/local/Ascend/nnal/atb/set_env.sh",
        )
    return Check("NNAL (ATB)", OK, version or home)
