"""Opens an NPU: takes its torch name, returns its operators, or raises one sentence that says what
is missing."""

import torch

from runtime.ascend.socs import NZ, KernelSet, Soc, soc_of
from runtime.common.broken_imports import preload_line
from runtime.common.errors import MISSING_COMPONENT, ToolkitError

from .kernels import undeclared
from .ops import NpuOps


def open_npu(device: str, kernels: str = "auto") -> NpuOps:
    """Take the NPU `device` ("npu:N") with the chip's set `kernels` (`--kernels`). ToolkitError with
    the command that fixes it when torch_npu, CANN or the device is missing, the chip is not in the
    table, or has no such set."""
    try:
        import torch_npu
    except ModuleNotFoundError:
        raise ToolkitError(
            f"--device {device} needs torch_npu, which is not installed; run: pip install torch_npu=="
            f"{torch.__version__.split('+')[0]}",
            MISSING_COMPONENT,
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        line = preload_line(str(error)) or "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
        raise ToolkitError(
            f"--device {device}: torch_npu cannot be loaded ({_first_line(error)}); run: {line}",
            MISSING_COMPONENT,
        ) from None
    count = torch.npu.device_count()
    index = int(device.split(":")[1])
    if index >= count:
        raise ToolkitError(
            f"--device {device}: torch_npu sees {count} NPUs; check `npu-smi info` and "
            "ASCEND_RT_VISIBLE_DEVICES",
            MISSING_COMPONENT,
        )
    torch.npu.set_device(index)
    soc = soc_of(torch_npu.npu.get_soc_version(), torch.npu.get_device_name(index))
    # kernels from the installed packages, none compiled at run time
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = soc.weight_format == NZ or soc.cache_format == NZ
    return NpuOps(soc, device, kernel_set(soc, kernels, torch_npu.__version__))


def kernel_set(soc: Soc, wanted: str, version: str) -> KernelSet:
    """The chip's set of that name, for "auto" its first that torch_npu `version` declares whole.

    ToolkitError if the chip has no such set, or torch_npu none.
    """
    if wanted != "auto" and wanted not in soc.kernels:
        raise ToolkitError(
            f"--kernels {wanted}: {soc.name} has no such set; use --kernels "
            f"{' or '.join(soc.kernels)}"
        )
    missing = []
    for name, variants in soc.kernels.items():
        if wanted not in ("auto", name):
            continue
        for kernels in variants:
            missing = undeclared(kernels)
            if not missing:
                return kernels
    raise ToolkitError(
        f"torch_npu {version} has no {missing[0]}, which decoding on {soc.name} needs; run: pip "
        "install torch_npu==2.13.0 (`python -m runtime.doctor` names its CANN), or use --device cpu",
        MISSING_COMPONENT,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
