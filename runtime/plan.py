"""What a model will need in memory, worked out from its tables before anything is read."""
from dataclasses import dataclass

import numpy as np
import torch

from models.quantized import PIECE, stored_weights

from .cache import KVCache
from .errors import ToolkitError

SMALL = 2 << 30         # decoders up to this many fp32 bytes run in float32 on the CPU; larger ones in bfloat16


@dataclass(frozen=True)
class Plan:
    """Bytes on the decoder's device."""
    weights: int
    cache: int
    dtype: torch.dtype
    cache_tokens: int

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


def decoder_parameters(family) -> int:
    """Values held in memory; a matrix that serves as embedding and as output head is held twice."""
    return sum(int(np.prod(w.shape)) for w, _ in _decoder_parts(family.weights()))


def decoder_bytes(family, dtype: torch.dtype) -> int:
    """Bytes of the directory's decoder weights in memory: int8 stays int8, except in W8A16 layers."""
    return sum(int(np.prod(w.shape)) * _itemsize(part.target, dtype) for w, part in _decoder_parts(stored_weights(family)))


def _decoder_parts(weights):
    return ((w, part) for w in weights for part in w.parts if not part.target.startswith("vision."))


def _itemsize(target: str, dtype: torch.dtype) -> int:
    piece = PIECE.fullmatch(target)
    if piece and piece[3] not in ("FLOAT", "W8A16"):
        return 1 if piece[4] == "weight" else 4
    return dtype.itemsize


def make_plan(family, dtype_name: str, cache_tokens: int) -> Plan:
    dtype = choose_dtype(dtype_name, family)
    cache = KVCache.bytes_per_token(family.decoder, dtype) * cache_tokens
    return Plan(decoder_bytes(family, dtype), cache, dtype, cache_tokens)


def check_memory(plan: Plan, free: int):
    """ToolkitError when `plan` needs more than the `free` bytes of its device."""
    if plan.total > free:
        raise ToolkitError(f"{plan.describe()}, but only {gib(free)} GiB are free; use --dtype bfloat16, a smaller "
                           "--max-model-len, or a machine with more memory")


def available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
