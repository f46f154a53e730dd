"""What differs between Ascend chips, as data: takes the number that torch_npu gives a chip, returns
the row of its generation.

runtime/ops/npu reads these rows and has no chip's name in it. Kernel names are keys of the tables
in its kernels.py.
"""

from dataclasses import dataclass, replace

from runtime.common.errors import ToolkitError

ND, NZ = 2, 29  # storage formats, by torch_npu's numbers: plain, and 16 x 16 tiles (FRACTAL_NZ)


@dataclass(frozen=True)
class Soc:
    """One generation of chips.

    dtypes: what its attention kernels compute in.  weight_format, cache_format: ND or NZ.
    block_sizes: tokens per cache block its attention kernels take, the default first.
    fused_bias: one kernel does x @ w + b with weights in `weight_format` (else torch_npu launches
    three).
    swiglu_multiple: its width must be a multiple for npu_swiglu.
    token_multiple: attention over whole prompts pads tokens to a multiple of it.
    cache_write, attention: kernels; attention has one for each phase of `ops.npu.ops.phase`.
    lens_on_device: paged attention reads the lengths from device memory, so that a graph can be
    replayed after changing them there; else they are host arguments, which torch_npu must update
    inside the graph.
    token_scales: the int8 matmul takes one activation scale per token.
    int64_scales: its output scales are int64 (float32 bits in the low half) whatever the dtype;
    else only for float16.
    """

    name: str
    dtypes: tuple[str, ...]
    weight_format: int
    cache_format: int
    block_sizes: tuple[int, ...]
    fused_bias: bool
    swiglu_multiple: int
    token_multiple: int
    cache_write: str
    attention: dict[str, str]
    lens_on_device: bool
    token_scales: bool
    int64_scales: bool


A2 = Soc(
    name="Ascend 910B (A2)",
    dtypes=("float16", "bfloat16"),
    weight_format=ND,
    cache_format=ND,
    block_sizes=(128,),
    fused_bias=True,
    swiglu_multiple=2,
    token_multiple=1,
    cache_write="scatter",
    attention={
        "context": "fusion",
        "prompt": "fused_infer",
        "extension": "fused_infer",
        "token": "fused_infer",
    },
    lens_on_device=False,
    token_scales=True,
    int64_scales=False,
)

A3 = replace(A2, name="Ascend 910C (A3)")

P310 = Soc(
    name="Ascend 310P",
    dtypes=("float16",),
    weight_format=NZ,
    cache_format=NZ,
    block_sizes=(128, 64),
    fused_bias=False,
    swiglu_multiple=32,
    token_multiple=16,
    cache_write="reshape_and_cache",
    attention={
        "context": "flash_unpadded",
        "prompt": "flash",
        "extension": "splitfuse",
        "token": "paged",
    },
    lens_on_device=True,
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
