"""Checks of the NPUs and their driver.

Takes a Host and what it found of NPUs, returns a Check each.
"""

import os
import re

from runtime.ascend.cann import numbers
from runtime.ascend.host import Device, Host, parse_npu_smi

from .check import ARCH, DOWNLOADS, MISMATCH, MISSING, NOTE, OK, VERSIONS, WARNING, Check, reason

NODES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
DRIVER_INFO = "/usr/local/Ascend/driver/version.info"
FIRMWARE_INFO = "/usr/local/Ascend/firmware/version.info"
NOT_FOUND = 127  # Host.run: there is no such command


def device_files(host: Host, nodes: list[str], cards: int) -> Check:
    """Whether the files of the NPUs (`nodes`) and of their driver are there and may be opened."""
    missing = [] if nodes else ["/dev/davinci*"]
    missing += [node for node in NODES if not host.path(node).exists()]
    if missing:
        found = f"missing: {', '.join(missing)}"
        if cards:
            found = f"{cards} cards on the PCI bus, {found}"
        devices = "--device " + " --device ".join(NODES)
        return Check(
            "device files",
            MISSING,
            found,
            f"docker run --device /dev/davinci0 {devices} ...   # in a "
            f"container; else install the driver {DOWNLOADS}",
        )
    locked = []
    for node in (*nodes, *map(str, map(host.path, NODES))):
        if not os.access(node, os.R_OK | os.W_OK):
            locked.append(node)
    if locked:
        return Check(
            "device files",
            MISMATCH,
            f"no permission for {', '.join(locked)}",
            "sudo usermod -aG HwHiAiUser $USER   # then log in again",
        )
    return Check("device files", OK, f"{len(nodes)} NPUs")


def driver(host: Host, chips: list[str]) -> Check:
    info = host.info(DRIVER_INFO)
    if info:
        version = info.get("package_version") or info.get("Version", "of unknown version")
        return Check("driver", OK, version)
    chip = chips[0].removeprefix("ascend") if chips else "<chip>"
    return Check(
        "driver",
        MISSING,
        f"{DRIVER_INFO} is not there",
        f"sudo ./Ascend-hdk-{chip}-npu-driver_<version>_linux-{ARCH}.run --full   # in a container instead: "
        "docker run -v /usr/local/Ascend/driver:/usr/local/Ascend/driver",
    )


def firmware(host: Host) -> Check:
    """Whether its version lies in the span that the driver takes."""
    version = host.info(FIRMWARE_INFO).get("Version")
    compatible = host.info(DRIVER_INFO).get("compatible_version_fw", "")
    span = re.findall(r"[\d.]+", compatible)
    if version is None:
        return Check("firmware", NOTE, "not told here (containers do not see it)")
    if len(span) == 2 and not numbers(span[0]) <= numbers(version)[:3] <= numbers(span[1]):
        return Check(
            "firmware",
            MISMATCH,
            f"{version}, the driver takes {span[0]} to {span[1]}",
            "sudo ./Ascend-hdk-<chip>-npu-firmware_<version of the driver>.run --full   "
            "# then restart the machine",
        )
    return Check("firmware", OK, version)


def list_devices(host: Host) -> tuple[list[Device], Check]:
    """The chips that npu-smi lists, and whether it could."""
    code, output = host.run("npu-smi", "info", timeout=30)
    devices = parse_npu_smi(output) if code == 0 else []
    if devices:
        socs = sorted({device.soc for device in devices})
        return devices, Check("npu-smi", OK, f"{len(devices)} chips: {', '.join(socs)}")
    if code == NOT_FOUND:
        fix = (
            "docker run -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi "
            "-v /usr/local/dcmi:/usr/local/dcmi ...   # in a container; else install the driver"
        )
    else:
        fix = (
            "sudo npu-smi info   # if that works: sudo usermod -aG HwHiAiUser $USER; "
            "else restart the machine"
        )
    return [], Check("npu-smi", MISSING, reason(output), fix)


def health(device: Device) -> Check:
    free = device.total - device.used
    name = f"npu {device.npu} chip {device.chip}"
    found = f"{device.soc}, {free:,} of {device.total:,} MB free"
    if device.health != "OK":
        found += f", health {device.health}"
        return Check(name, MISMATCH, found, f"npu-smi info -t health -i {device.npu}")
    if device.name not in VERSIONS["chips"]:
        found += f"; not one of {', '.join(VERSIONS['chips'])}"
        return Check(name, WARNING, found, "--device cpu")
    return Check(name, OK, found)
