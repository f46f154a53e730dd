"""What a benchmark writes beside its figures: takes the engine and the options, returns every
argument with the value that was used, and the most memory that host and device have had."""

import resource
from dataclasses import asdict

from runtime.common.machine import gib

from .options import BenchOptions


def used_arguments(engine, options: BenchOptions) -> dict:
    """Name -> value of every argument of the command; where one was left to us, what we chose."""
    arguments = asdict(options) | asdict(engine.options)
    arguments["dtype"] = str(engine.plan.dtype).removeprefix("torch.")
    arguments["max_model_len"] = engine.max_model_len
    return arguments


def peak_memory(engine) -> dict:
    """{"peak_host_bytes", "peak_device_bytes"}: the most that this process has had; None for a
    device that shares the host's memory."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_host_bytes": host, "peak_device_bytes": engine.peak_device_bytes()}


def describe_peaks(found: dict) -> str:
    text = f"peak memory: {gib(found['peak_host_bytes'])} GiB on the host"
    if found["peak_device_bytes"] is not None:
        text += f", {gib(found['peak_device_bytes'])} GiB on the device"
    return text
