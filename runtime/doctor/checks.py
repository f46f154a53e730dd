"""All checks of `runtime.doctor`.

Takes a Host, returns one Check per component, each failure with the command that fixes it.
"""

from dataclasses import dataclass

from runtime.ascend.host import Device, Host, npu_nodes

from . import cann, npu, packages
from .check import BROKEN, OK, VERSIONS, Check


@dataclass(frozen=True)
class Examination:
    checks: list[Check]
    devices: list[Device]
    has_npu: bool

    @property
    def passed(self) -> bool:
        return not any(check.status in BROKEN for check in self.checks)


def examine(host: Host) -> Examination:
    """Everything that can be seen; of a machine without an NPU what is missing for one does not
    count."""
    nodes = npu_nodes(host.root)
    cards = host.cards()
    devices, smi = npu.list_devices(host)
    checks = [packages.python(host), _memory(host), *packages.required(host)]
    if not (nodes or cards or devices):
        return Examination([*checks, *_without_npu(host)], [], has_npu=False)
    chips = _chips(devices)
    toolkit = cann.active_toolkit(host)
    checks += [
        npu.device_files(host, nodes, cards),
        npu.driver(host, chips),
        npu.firmware(host),
        smi,
        *map(npu.health, devices),
        *cann.toolkit_checks(host, toolkit, chips),
        cann.atb(host, toolkit, chips),
        packages.torch(host, toolkit),
        packages.torch_npu(host, toolkit),
        packages.ais_bench(host, toolkit),
        packages.msmodelslim(host),
    ]
    return Examination(checks, devices, has_npu=True)


def _memory(host: Host) -> Check:
    free, total = host.memory()
    return Check("memory", OK, f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def _without_npu(host: Host) -> list[Check]:
    checks = []
    if host.toolkits():
        found = f"{cann.versions(host.toolkits())} (for atc; no NPU needed)"
        checks.append(Check("CANN toolkit", OK, found))
    return [*checks, packages.torch(host, None)]


def _chips(devices: list[Device]) -> list[str]:
    """Names of the known chips as CANN's packages have them: ["ascend910b"]."""
    chips = set()
    for device in devices:
        if device.name in VERSIONS["chips"]:
            chips.add(VERSIONS["chips"][device.name])
    return sorted(chips)
