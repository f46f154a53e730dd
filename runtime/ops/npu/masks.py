"""Causal masks of the NPU's attention kernels, each made once on the device.

Takes lengths, returns tensors in the form that one kernel wants; which kernel wants which is read
in kernels.py.
"""

from functools import cached_property

import torch
from torch.nn import functional as F

from runtime.ascend.socs import NZ

SIZE = 2048  # side of the compressed masks, whatever the sequence length
PAGED_SIZE = 128  # side of the one for `_npu_flash_attention_qlens`
TILE = 16
HIDDEN = float("-inf")
SPLITFUSE_HIDDEN = -10000.0


class Masks:
    """The masks of one device. 0 where a key is seen, unless said otherwise."""

    def __init__(self, device: str):
        self._device = device
        self._paged: dict[torch.dtype, torch.Tensor] = {}

    @cached_property
    def int8(self) -> torch.Tensor:
        """[2048, 2048], 1 = hidden."""
        return torch.ones(SIZE, SIZE, dtype=torch.int8).triu(1).to(self._device)

    @cached_property
    def additive(self) -> torch.Tensor:
        """[2048, 2048] float16, added to the scores."""
        return _causal(SIZE, SPLITFUSE_HIDDEN).to(self._device)

    @cached_property
    def tiles(self) -> torch.Tensor:
        """[1, 128, 2048, 16] float16 in NZ, added to the scores."""
        return self._in_tiles(_causal(SIZE, HIDDEN))

    def paged(self, dtype: torch.dtype) -> torch.Tensor:
        """[128, 128] in the dtype of the queries: added in float16; in bfloat16 the kernel
        multiplies it, so that 1 = hidden (SGLang and vllm-ascend make it so)."""
        if dtype not in self._paged:
            hidden = HIDDEN if dtype == torch.float16 else 1
            mask = torch.full((PAGED_SIZE, PAGED_SIZE), hidden, dtype=dtype).triu(1)
            self._paged[dtype] = mask.to(self._device)
        return self._paged[dtype]

    def prompt_tiles(self, q_lens: list[int], kv_lens: list[int]) -> torch.Tensor:
        """[1, S / 16, S, 16] float16 in NZ for whole prompts, S the longest of them."""
        return self._in_tiles(_causal(max(q_lens), HIDDEN))

    def row_tiles(self, q_lens: list[int], kv_lens: list[int]) -> torch.Tensor:
        """[1, columns / 16, T, 16] float16 in NZ: a row for each of T queries, whose sequences end
        with them; columns: keys of the longest sequence."""
        ends = zip(q_lens, kv_lens)
        positions = torch.cat([torch.arange(kv - q, kv) for q, kv in ends])
        hidden = torch.arange(max(kv_lens)) > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=torch.float16)
        return self._in_tiles(mask.masked_fill(hidden, HIDDEN))

    def _in_tiles(self, mask: torch.Tensor) -> torch.Tensor:
        """[rows, columns] -> [1, columns / 16, rows, 16] in NZ, both filled up to 16."""
        rows, columns = mask.shape
        mask = F.pad(mask, (0, -columns % TILE, 0, -rows % TILE))
        tiles = mask.view(len(mask), -1, TILE).transpose(0, 1)[None].contiguous()
        return torch.ops.npu.npu_format_cast(tiles.to(self._device), NZ)


def _causal(size: int, hidden: float) -> torch.Tensor:
    return torch.full((size, size), hidden, dtype=torch.float16).triu(1)
