"""Memory of a model: weights, vision encoder, KV cache, workspace."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.checkpoint.table import Target, WeightTable
from runtime.common.errors import ToolkitError
from runtime.common.machine import gib

if TYPE_CHECKING:
    import torch

COLLECTIVE_BUFFERS = (
    400 << 20
)  # bytes per device with more than one: HCCL_BUFFSIZE, 200 MB, for sending and for receiving
VISION_WORKSPACE = 0.2  # of the encoder's weights, for its activations; assumed
KERNEL_WORKSPACE = 512 << 20  # bytes for the kernels' own scratch memory and code; assumed


DEFAULT_MAX_NUM_SEQS = 8  # decoded together when --max-num-seqs is not given
DEFAULT_MAX_MODEL_LEN = (
    8192  # longest sequence when --max-model-len is not given, whatever the model could
)
FLOAT32_UP_TO_BYTES = (
    2 << 30
)  # decoders up to this many fp32 bytes run in float32 on the CPU; larger ones in bfloat16
VISION_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # per weight of the encoder on the CPU


@dataclass(frozen=True)
class Plan:
    """Bytes on each of `devices`; on the first, which has most. workspace is counted on NPUs. wanted_tokens: what the
    cache would hold if there were memory for it."""

    weights: int
    cache: int
    dtype: torch.dtype
    cache_tokens: int
    devices: int = 1
    vision: int = 0
    workspace: int = 0
    wanted_tokens: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.vision + self.workspace

    def describe(self) -> str:
        more = {"vision": self.vision, "workspace": self.workspace}
        text = "".join(f" + {name} {gib(size)}" for name, size in more.items() if size)
        where = f" on each of {self.devices} devices" if self.devices > 1 else ""
        cut = f" of the {self.wanted_tokens}" if self.wanted_tokens > self.cache_tokens else ""
        return (
            f"memory: weights {gib(self.weights)} + cache {gib(self.cache)} for {self.cache_tokens}{cut} tokens{text} = "
            f"{gib(self.total)} GiB{where}"
        )


def max_model_len_for(family, asked: int | None) -> int:
    """Tokens of the longest sequence when --max-model-len is `asked`."""
    most = family.decoder.max_length
    if asked is not None and asked > most:
        raise ToolkitError(
            f"--max-model-len {asked} is more than the {most} tokens of {family.name}; lower it"
        )
    return min(most, DEFAULT_MAX_MODEL_LEN) if asked is None else asked


def choose_dtype(name: str, family) -> torch.dtype:
    import torch

    if name != "auto":
        return getattr(torch, name)
    return (
        torch.float32 if 4 * decoder_parameters(family) <= FLOAT32_UP_TO_BYTES else torch.bfloat16
    )


def decoder_parameters(family, split=None) -> int:
    """Values in memory, of the whole decoder or on the first device of `split`; a matrix that serves as embedding and as
    output head is held twice."""
    from runtime.parallel.split import Split

    split = split or Split(family.decoder)
    count = 0
    for row in WeightTable(family.weights()).decoder():
        for part in row.parts:
            count += math.prod(row.shape) * split.share(part.target)
    return int(count)


def decoder_bytes(
    family, dtype: torch.dtype, split, cpu_weights: str = "float", one_layer: bool = False
) -> int:
    """Of the directory's decoder weights on the first device of `split`, as --cpu-weights packs them; of its layers one or
    all. Scales are counted where they are stored, and for int4."""
    from models.checkpoint.quantized import stored_weights

    def share(target):
        share = split.share(target)
        in_layer = target.layer is not None
        return share / family.decoder.layers if one_layer and in_layer else share

    count = 0
    for row in stored_weights(family).decoder():
        for part in row.parts:
            bits = _bits(part.target, dtype, cpu_weights)
            count += math.prod(row.shape) * share(part.target) * bits / 8
    return int(count)


def _bits(target: Target, dtype: torch.dtype, cpu_weights: str) -> float:
    """int8 stays int8, except in W8A16 layers."""
    from .cpu_weights import bits

    if target.is_piece and target.kind not in ("FLOAT", "W8A16"):
        return 8 if target.tensor == "weight" else 32
    return bits(str(target), cpu_weights, dtype)


def vision_parameters(family) -> int:
    return sum(math.prod(row.shape) for row in WeightTable(family.weights()).vision())


def make_plan(
    family,
    dtype_name: str,
    cache_tokens: int,
    devices: int = 1,
    cpu_weights: str = "float",
    one_layer: bool = False,
) -> Plan:
    """The decoder's weights and cache, split over `devices`."""
    from runtime.engine.kv_cache import KVCache
    from runtime.parallel.split import Split

    dtype = choose_dtype(dtype_name, family)
    split = Split(family.decoder, devices)
    cache = KVCache.bytes_per_token(split.config, dtype) * cache_tokens
    return Plan(
        decoder_bytes(family, dtype, split, cpu_weights, one_layer),
        cache,
        dtype,
        cache_tokens,
        devices,
    )


def on_npu(plan: Plan, family, longest: int, vision: bool = True) -> Plan:
    """`plan` with what an NPU holds besides: the `vision` encoder, in half precision, and memory to compute prompts of up
    to `longest` tokens."""
    from runtime.parallel.split import Split

    c = Split(family.decoder, plan.devices).config
    width = (
        4 * c.hidden + (c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.ffn
    )  # rows alive at once in a layer
    workspace = (
        longest * width * plan.dtype.itemsize
        + KERNEL_WORKSPACE
        + (plan.devices > 1) * COLLECTIVE_BUFFERS
    )
    encoder = vision * int(2 * vision_parameters(family) * (1 + VISION_WORKSPACE))
    return replace(plan, vision=encoder, workspace=workspace)


def plan_engine(family, dtype: str, longest: int, options, free: int | None) -> Plan:
    """What an Engine takes: a cache for --max-num-seqs sequences of `longest` tokens, or for as much of them as
    --memory-utilization of the `free` bytes leaves room for, and the vision encoder if the model has one.

    ToolkitError when not even one sequence fits. free None: not checked.
    """
    wanted = options.cache_tokens or max(
        longest, (options.max_num_seqs or DEFAULT_MAX_NUM_SEQS) * longest
    )
    plan = make_plan(
        family,
        dtype,
        wanted,
        options.tensor_parallel_size,
        options.cpu_weights,
        options.layer_by_layer,
    )
    if options.device == "cpu":
        encoder = VISION_BYTES[options.vision_precision] * vision_parameters(family)
        plan = replace(plan, vision=encoder * (options.vision != "om"))
    else:
        plan = on_npu(
            plan,
            family,
            longest,
            vision="npu" in options.device and options.vision in ("auto", "om"),
        )
    if free is None:
        return plan
    each = plan.cache // wanted
    room = int(free * options.memory_utilization - (plan.total - plan.cache)) // each
    if room < (options.cache_tokens or longest):
        refuse(plan, free, options, room)
    return replace(
        plan, cache=min(room, wanted) * each, cache_tokens=min(room, wanted), wanted_tokens=wanted
    )


def refuse(plan: Plan, free: int, options, room: int):
    """ToolkitError that says what fits: `room` tokens in the cache, or none."""
    smaller = {
        "cpu": "--dtype bfloat16, --cpu-weights int8 or int4,",
        "cuda": "--dtype float16",
    }.get(options.device.split(":")[0], "--tensor-parallel-size 2")
    advice = (
        f"the most that fits is one sequence of {room} tokens: --max-num-seqs 1 --max-model-len {room}"
        if room > 0
        else f"weights and encoder alone do not fit: use {smaller} or a machine with more memory"
    )
    raise ToolkitError(
        f"{plan.describe()}, but only {gib(free)} GiB are free, of which --memory-utilization "
        f"{options.memory_utilization:g} may be taken; {advice}"
    )
