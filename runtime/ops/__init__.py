"""The operator set of the decoder, one module per backend: reference (plain torch, the oracle) and cpu (fast)."""
from ..errors import MISSING_COMPONENT, ToolkitError


def choose(name: str, device: str):
    """Backend object for `--ops` (auto | reference | cpu) on `device`. An explicit choice never falls back to another."""
    kind = device.split(":")[0]
    if kind == "npu":
        raise ToolkitError("--device npu needs the torch_npu backend, which this version does not have yet; "
                           "use --device cpu", MISSING_COMPONENT)
    if kind not in ("cpu", "cuda"):
        raise ToolkitError(f"device {device!r} is not known; use cpu")
    if name == "auto":
        name = "cpu" if kind == "cpu" else "reference"
    if name == "cpu" and kind == "cpu":
        from .cpu import CpuOps
        return CpuOps()
    if name == "reference":
        from .reference import ReferenceOps
        return ReferenceOps()
    raise ToolkitError(f"--ops {name} does not run on --device {device}; use --ops auto")
