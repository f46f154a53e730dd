"""Opens an NPU: takes its torch name, returns its operators, or raises one sentence that says what
is missing."""

import torch

from runtime.ascend.socs import NZ, soc_of
from runtime.common.broken_imports import preload_line
from runtime.common.errors import MISSING_COMPONENT, ToolkitError

from .ops import NpuOps


def open_npu(device: str) -> NpuOps:
    """Take the NPU `device` ("npu:N"). ToolkitError with the command that fixes it when torch_npu,
    CANN or the device is missing, or the chip is not in the table."""
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
    if soc.cache_write == "scatter":
        check_scatter(torch.ops.npu.npu_scatter_pa_kv_cache.default, torch_npu.__version__)
    # kernels from the installed packages, none compiled at run time
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = soc.weight_format == NZ or soc.cache_format == NZ
    return NpuOps(soc, device)


def check_scatter(operator, version: str):
    """ToolkitError for the operator of torch_npu 2.7 to 2.9, which cannot write a cache in ND."""
    if "cache_mode" not in {argument.name for argument in operator._schema.arguments}:
        raise ToolkitError(
            f"torch_npu {version} is too old to decode on this chip: its npu_scatter_pa_kv_cache has "
            "no cache_mode; run: pip install torch_npu==2.13.0 (`python -m runtime.doctor` names its "
            "CANN), or use --device cpu",
            MISSING_COMPONENT,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
