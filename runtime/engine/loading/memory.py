"""Memory of a model: takes a family and options, returns the Plan of its bytes: weights, vision
encoder, KV cache, workspace."""

import math
from dataclasses import dataclass, replace

import torch

from models.checkpoint.quantized import stored_weights
from models.checkpoint.table import Target, WeightTable
from runtime.common.errors import ToolkitError
from runtime.common.machine import gib
from runtime.engine.kv_cache import KVCache
from runtime.parallel.split import Split

from .cpu_weights import bits_per_value

# bytes per device where there are several: HCCL_BUFFSIZE, 200 MB, for sending and for receiving
COLLECTIVE_BUFFERS = 400 << 20
VISION_WORKSPACE = 0.2  # of the encoder's weights, for its activations; assumed
KERNEL_WORKSPACE = 512 << 20  # bytes for the kernels' own scratch memory and code; assumed

DEFAULT_MAX_NUM_SEQS = 8
DEFAULT_MAX_MODEL_LEN = 8192  # or less, where the model's own limit is lower
# decoders of up to so many float32 bytes run in float32 on the CPU, larger ones in bfloat16
FLOAT32_UP_TO_BYTES = 2 << 30
VISION_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # per weight of the encoder on the CPU


@dataclass(frozen=True)
class Plan:
    """Bytes of a model on the device that holds most of it, the first of `devices`.

    cache_tokens: what the cache holds; wanted_tokens: what it would hold if there were memory for
    it. vision and workspace are 0 where they are not counted; workspace is counted on NPUs only.
    """

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
    """Tokens of the longest sequence when --max-model-len is `asked`; ToolkitError if the model
    cannot."""
    limit = family.decoder.max_length
    if asked is None:
        return min(limit, DEFAULT_MAX_MODEL_LEN)
    if asked > limit:
        raise ToolkitError(
            f"--max-model-len {asked} is more than the {limit} tokens of {family.name}; lower it"
        )
    return asked


def choose_dtype(name: str, family) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    is_small = 4 * decoder_parameters(family) <= FLOAT32_UP_TO_BYTES
    return torch.float32 if is_small else torch.bfloat16


def decoder_parameters(family, split=None) -> int:
    """Values in memory, of the whole decoder or on the first device of `split`; a matrix that
    serves as embedding and as output head is held twice."""
    split = split or Split(family.decoder)
    count = 0
    for row in WeightTable(family.weights()).decoder():
        for part in row.parts:
            count += math.prod(row.shape) * split.share(part.target)
    return int(count)


def decoder_bytes(
    family, dtype: torch.dtype, split, cpu_weights: str = "float", one_layer: bool = False
) -> int:
    """Bytes of the directory's decoder weights on the first device of `split`, as --cpu-weights
    packs them.

    one_layer: of one layer in place of all. Scales are counted where they are stored, and for int4.
    """
    size = 0
    for row in stored_weights(family).decoder():
        for part in row.parts:
            values = math.prod(row.shape) * split.share(part.target)
            if one_layer and part.target.layer is not None:
                values /= family.decoder.layers
            size += values * _stored_bits(part.target, dtype, cpu_weights) / 8
    return int(size)


def _stored_bits(target: Target, dtype: torch.dtype, cpu_weights: str) -> float:
    """Bits per value in memory: int8 stays int8, except in W8A16 layers."""
    if target.is_piece and target.kind not in ("FLOAT", "W8A16"):
        return 8 if target.tensor == "weight" else 32
    return bits_per_value(str(target), cpu_weights, dtype)


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
    """`plan` with what an NPU holds besides: the `vision` encoder, in half precision, and memory to
    compute prompts of up to `longest` tokens."""
    c = Split(family.decoder, plan.devices).config
    # rows alive at once in a layer
    width = 4 * c.hidden + (c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.ffn
    workspace = longest * width * plan.dtype.itemsize + KERNEL_WORKSPACE
    if plan.devices > 1:
        workspace += COLLECTIVE_BUFFERS
    encoder = 0
    if vision:
        encoder = int(2 * vision_parameters(family) * (1 + VISION_WORKSPACE))
    return replace(plan, vision=encoder, workspace=workspace)


def plan_engine(family, dtype: str, longest: int, options, free: int | None) -> Plan:
    """What an Engine takes: a cache for --max-num-seqs sequences of `longest` tokens, or for as
    much of them as --memory-utilization of the `free` bytes leaves room for, and the vision encoder
    if the model has one.

    ToolkitError when not even one sequence fits. free None: not checked.
    """
    max_num_seqs = options.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    wanted = options.cache_tokens or max_num_seqs * longest
    plan = make_plan(
        family,
        dtype,
        wanted,
        options.tensor_parallel_size,
        options.cpu_weights,
        options.layer_by_layer,
    )
    plan = with_vision(plan, family, longest, options)
    if free is None:
        return plan
    bytes_per_token = plan.cache // wanted
    room = int(free * options.memory_utilization - (plan.total - plan.cache)) // bytes_per_token
    if room < (options.cache_tokens or longest):
        raise does_not_fit(plan, free, options, room)
    tokens = min(room, wanted)
    return replace(plan, cache=tokens * bytes_per_token, cache_tokens=tokens, wanted_tokens=wanted)


def with_vision(plan: Plan, family, longest: int, options) -> Plan:
    """`plan` with the vision encoder where its device runs it, and with an NPU's workspace."""
    if options.device != "cpu":
        on_device = "npu" in options.device and options.vision in ("auto", "om")
        return on_npu(plan, family, longest, vision=on_device)
    if options.vision == "om":
        return plan
    encoder = VISION_BYTES[options.vision_precision] * vision_parameters(family)
    return replace(plan, vision=encoder)


def does_not_fit(plan: Plan, free: int, options, room: int) -> ToolkitError:
    """The error that says what fits: `room` tokens in the cache, or none."""
    if room > 0:
        advice = (
            f"the most that fits is one sequence of {room} tokens: --max-num-seqs 1 "
            f"--max-model-len {room}"
        )
    else:
        smaller = {
            "cpu": "--dtype bfloat16, --cpu-weights int8 or int4,",
            "cuda": "--dtype float16",
        }.get(options.device.split(":")[0], "--tensor-parallel-size 2")
        advice = (
            f"weights and encoder alone do not fit: use {smaller} or a machine with more memory"
        )
    return ToolkitError(
        f"{plan.describe()}, but only {gib(free)} GiB are free, of which --memory-utilization "
        f"{options.memory_utilization:g} may be taken; {advice}"
    )
