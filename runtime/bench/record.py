"""What a benchmark writes beside its figures: takes the engine and the options, returns every
argument with the value that was used, and the most memory that host and device have had."""

import resource
from dataclasses import asdict

from runtime.ascend.host import Host, parse_npu_smi
from runtime.common.machine import gib

from .options import BenchOptions


def used_arguments(engine, options: BenchOptions) -> dict:
    """Name -> value of every argument of the command; where one was left to us, what we chose."""
    arguments = asdict(options) | asdict(engine.options)
    arguments["dtype"] = str(engine.plan.dtype).removeprefix("torch.")
    arguments["max_model_len"] = engine.max_model_len
    return arguments


def peak_memory(engine) -> dict:
    """{"peak_host_bytes", "peak_device_bytes", "npu_smi_used_bytes"}.

    The first two are the most that this process has had: on the device what torch had, None where
    the host's memory is used. The last is what npu-smi shows of the NPU now, with an .om and with
    other processes; None without npu-smi.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_host_bytes": host,
        "peak_device_bytes": engine.peak_device_bytes(),
        "npu_smi_used_bytes": npu_used_bytes(engine.options.device),
    }


def npu_used_bytes(device: str) -> int | None:
    """Of the NPU that the decoder runs on, or of NPU 0, which an .om takes beside a CPU decoder."""
    _, table = Host().run("npu-smi", "info", timeout=10)
    used = [each.used for each in parse_npu_smi(table)]
    kind, _, number = device.partition(":")
    index = int(number) if kind == "npu" else 0
    if index >= len(used):
        return None
    return used[index] << 20


def describe_peaks(found: dict) -> str:
    text = f"peak memory: {gib(found['peak_host_bytes'])} GiB on the host"
    if found["peak_device_bytes"] is not None:
        text += f", {gib(found['peak_device_bytes'])} GiB on the device"
    if found["npu_smi_used_bytes"] is not None:
        text += f" (npu-smi shows {gib(found['npu_smi_used_bytes'])} GiB in use)"
    return text
