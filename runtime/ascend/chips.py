"""The Ascend chips: memory, bandwidth, arithmetic; each figure with its source.

Data only: CHIPS takes the name that atc and `npu-smi` know and returns the chip.
"""

from dataclasses import dataclass, replace

from .socs import A2, P310, Soc

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One chip's figures.

    memory: bytes of one device that npu-smi shows; idle: those it shows in use with no process.
    bandwidth: bytes/s of that memory; memory_efficiency: the share of it that decoding reaches.
    flops: peak floating-point operations per second in half precision.
    link: bytes/s between devices, one direction.
    """

    name: str
    soc: Soc
    memory: int
    idle: int
    bandwidth: float
    flops: float
    link: float
    memory_efficiency: float


# Peaks, bandwidths and links: msmodeling's device profiles (376T_64G, 313T_64G, 280T), assigned by
# core counts.
# idle: npu-smi shows 3.4 GB in use on 910B2 without a process (vllm-ascend issues 2534, 2833).
# memory_efficiency: VisualGLM-6B's published 16.73 ms per token are 0.42, msmodeling starts from
# 0.6; the middle of both.
B3 = Chip("Ascend910B3", A2, 64 * GIB, 3400 << 20, 1.6 * 2**40, 313e12, 196e9, 0.5)
B4 = replace(
    B3, name="Ascend910B4", memory=32 * GIB, bandwidth=0.8 * 2**40, flops=280e12, link=63e9
)
# Half a 300I Duo, or a 300I Pro: 24 GB of LPDDR4X, of which npu-smi shows nine tenths (nvtop issue
# 421: 44280 MB of 48 GB, 1529 MB in use). flops: half of the 140 TOPS in int8. link: half of PCIe
# 4.0 x16. memory_efficiency: Qwen3-8B under MindIE at 10 tokens/s (vllm-ascend issue 1487) is 0.8.
P3 = Chip("Ascend310P3", P310, int(21.6 * GIB), 1529 << 20, 204e9, 70e12, 16e9, 0.75)
CHIPS = {
    chip.name: chip
    for chip in (
        replace(B3, name="Ascend910B1", flops=376e12),
        replace(B3, name="Ascend910B2", flops=376e12),
        B3,
        B4,
        replace(B4, name="Ascend910B4-1", memory=64 * GIB, bandwidth=1.6 * 2**40),
        P3,
    )
}
