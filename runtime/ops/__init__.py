"""The operator set of the decoder: takes a device and the backend's name, returns its operators.

One module or folder per backend: reference (plain torch, the oracle), cpu (fast), npu, cuda.
"""

from runtime.common.errors import ToolkitError


def choose(name: str, device: str, kernels: str = "auto"):
    """Backend for `--ops` (auto | reference | cpu) on `device` (cpu, npu:N, cuda:N), on an NPU with
    the set of `--kernels`.

    An explicit choice never falls back to another; ToolkitError when it cannot be.
    """
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "npu"):
        raise ToolkitError(f"device {device!r} is not known; use cpu, npu:N or cuda:N")
    openers = {"cpu": _cpu, "npu": _npu, "cuda": _cuda}
    own = openers[kind](device, kernels)  # a device must be opened even for plain torch
    if name in ("auto", own.name):
        return own
    if name == "reference":
        return _reference(device)
    raise ToolkitError(f"--ops {name} does not run on --device {device}; use --ops auto")


def _reference(device):
    from .reference import ReferenceOps

    return ReferenceOps()


def _cpu(device, kernels):
    from runtime.ops.cpu.ops import CpuOps

    return CpuOps()


def _cuda(device, kernels):
    from .cuda import open_cuda

    return open_cuda(device)


def _npu(device, kernels):
    from runtime.ops.npu.open import open_npu

    return open_npu(device, kernels)
