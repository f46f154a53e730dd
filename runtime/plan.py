"""What a model will need in memory, worked out from its tables before anything is read."""
import math
from dataclasses import dataclass

import torch

from .cache import KVCache
from .errors import ToolkitError
from .split import Split

SMALL = 2 << 30         # decoders up to this many fp32 bytes run in float32 on the CPU; larger ones in bfloat16


@dataclass(frozen=True)
class Plan:
    """Bytes on the decoder's device."""
    weights: int
    cache: int
    dtype: torch.dtype
    cache_tokens: int
    devices: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.cache

    def describe(self) -> str:
        return (f"memory: weights {gib(self.weights)} + cache {gib(self.cache)} for {self.cache_tokens} tokens = "
                f"{gib(self.total)} GiB")


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def choose_dtype(name: str, family) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if 4 * decoder_parameters(family) <= SMALL else torch.bfloat16


def decoder_parameters(family, split=None) -> int:
    """Values in memory, of the whole decoder or on the first device of `split`; a matrix that serves as embedding and as
    output head is held twice."""
    split = split or Split(family.decoder)
    return int(sum(math.prod(w.shape) * split.share(part.target) for w in family.weights() for part in w.parts
                   if not part.target.startswith("vision.")))


def make_plan(family, dtype_name: str, cache_tokens: int, devices: int = 1) -> Plan:
    dtype, split = choose_dtype(dtype_name, family), Split(family.decoder, devices)
    cache = KVCache.bytes_per_token(split.config, dtype) * cache_tokens
    return Plan(decoder_parameters(family, split) * dtype.itemsize, cache, dtype, cache_tokens, devices)


def check_memory(plan: Plan, free: int):
    """ToolkitError when `plan` needs more than the `free` bytes of its device."""
    if plan.total > free:
        raise ToolkitError(f"{plan.describe()}, but only {gib(free)} GiB are free; use --dtype bfloat16, a smaller "
                           "--max-model-len, or a machine with more memory")


def available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
