"""What differs between Ascend chips, as data: takes the number that torch_npu gives a chip, returns
the row of its generation.

runtime/ops/npu reads these rows and has no chip's name in it. Kernel names are keys of the tables
in its kernels.py.
"""

from dataclasses import dataclass, replace

from runtime.common.errors import ToolkitError

ND, NZ = 2, 29  # storage formats, by torch_npu's numbers: plain, and 16 x 16 tiles (FRACTAL_NZ)


@dataclass(frozen=True)
class KernelSet:
    """Attention and cache-write kernels that work together on one layout of the cache.

    block_sizes: tokens per cache block that all of them take, the default first.
    cache_write, attention: kernels; attention has one for each phase of `ops.npu.ops.phase`.
    lengths: where attention reads how long the cached sequences are. "list": arguments, which
    torch_npu updates inside a recorded graph; "device": a tensor on the device, an input of the
    graph; "host": a tensor in host memory, read at the launch.
    graphs: decode steps can be recorded, which lengths on the host and aclop kernels prevent.
    """

    block_sizes: tuple[int, ...]
    cache_write: str
    attention: dict[str, str]
    lengths: str
    graphs: bool


@dataclass(frozen=True)
class Soc:
    """One generation of chips.

    dtypes: what its attention kernels compute in.  weight_format, cache_format: ND or NZ.
    fused_bias: one kernel does x @ w + b with weights in `weight_format` (else torch_npu launches
    three).
    swiglu_multiple: its width must be a multiple for npu_swiglu.
    token_multiple: attention over whole prompts pads tokens to a multiple of it.
    kernels: its sets by the names of --kernels, the one that `auto` takes first; of each the variants
    for releases of torch_npu, the newest first: the first is used whose operators are all there.
    token_scales: the int8 matmul takes one activation scale per token.
    int64_scales: its output scales are int64 (float32 bits in the low half) whatever the dtype;
    else only for float16.
    """

    name: str
    dtypes: tuple[str, ...]
    weight_format: int
    cache_format: int
    fused_bias: bool
    swiglu_multiple: int
    token_multiple: int
    kernels: dict[str, tuple[KernelSet, ...]]
    token_scales: bool
    int64_scales: bool


A2_ACLNN = KernelSet(
    block_sizes=(128,),
    cache_write="scatter_blocks",
    attention={
        "context": "fusion",
        "prompt": "fused_infer",
        "extension": "fused_infer",
        "token": "fused_infer",
    },
    lengths="list",
    graphs=True,
)
# Before torch_npu 2.13 npu_scatter_pa_kv_cache writes tiles only (op-plugin 7.2 and 7.3).
A2_ACLNN_OLDER = replace(A2_ACLNN, cache_write="scatter_rows")

# Block sizes: multiples of 16, block size * head size up to 128 * 128 (ATB's tiling of paged
# attention). One kernel for all steps of several causal queries, as SGLang has it.
A2_ATB = KernelSet(
    block_sizes=(128, 64, 32, 16),
    cache_write="reshape_and_cache",
    attention={
        "context": "flash_unpadded",
        "prompt": "flash_paged",
        "extension": "flash_paged",
        "token": "paged",
    },
    lengths="host",
    graphs=False,
)

P310_ATB = KernelSet(
    block_sizes=(128, 64),
    cache_write="reshape_and_cache",
    attention={
        "context": "flash_unpadded",
        "prompt": "flash",
        "extension": "splitfuse",
        "token": "paged",
    },
    lengths="device",
    graphs=True,
)
# Before torch_npu 2.13 there are no compressed masks, and matmuls with tiled weights are aclop
# kernels.
P310_ATB_OLDER = replace(
    P310_ATB,
    attention={**P310_ATB.attention, "prompt": "flash_masked", "extension": "splitfuse_masked"},
    graphs=False,
)

A2 = Soc(
    name="Ascend 910B (A2)",
    dtypes=("float16", "bfloat16"),
    weight_format=ND,
    cache_format=ND,
    fused_bias=True,
    swiglu_multiple=2,
    token_multiple=1,
    kernels={"aclnn": (A2_ACLNN, A2_ACLNN_OLDER), "atb": (A2_ATB,)},
    token_scales=True,
    int64_scales=False,
)

A3 = replace(A2, name="Ascend 910C (A3)")

P310 = Soc(
    name="Ascend 310P",
    dtypes=("float16",),
    weight_format=NZ,
    cache_format=NZ,
    fused_bias=False,
    swiglu_multiple=32,
    token_multiple=16,
    kernels={"atb": (P310_ATB, P310_ATB_OLDER)},
    token_scales=False,
    int64_scales=True,
)

# torch_npu's numbers: 310P1, P3, P5, P7; 910B1, B2, B2C, B3, B4, B4-1; 910_9391 to 910_9362.
CODES = {range(200, 206): P310, range(220, 226): A2, range(250, 256): A3}


def soc_of(code: int, name: str) -> Soc:
    """The row of the chip `name`, whose number is `code`; ToolkitError for one that is not in the
    table."""
    for codes, soc in CODES.items():
        if code in codes:
            return soc
    known = ", ".join(soc.name for soc in CODES.values())
    raise ToolkitError(
        f"the chip {name} (number {code}) is not supported; supported are {known}; use --device cpu"
    )
