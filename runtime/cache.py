"""The paged key/value cache: fixed blocks, a free list, and the block table of each sequence."""
import torch


class KVCache:
    """Per layer a pair of tensors, keys and values, in the layout of the backend `ops`; slots know no layout."""

    def __init__(self, config, blocks: int, block_size: int, dtype, device, ops):
        self.block_size = block_size
        self.layers = [tuple(ops.cache(config, blocks, block_size, dtype, device) for _ in "kv")
                       for _ in range(config.layers)]
        self._free = list(range(blocks))[::-1]

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, tokens: int) -> torch.Tensor:
        """Block table int32 [blocks] for a sequence of up to `tokens`; the caller has checked `free_blocks`."""
        return torch.tensor([self._free.pop() for _ in range(self.blocks_for(tokens))], dtype=torch.int32)

    def release(self, table: torch.Tensor):
        self._free.extend(table.tolist())

    def slots(self, table: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Cache slots int64 of the token range [start, end) of a sequence."""
        place = torch.arange(start, end)
        return table[place // self.block_size].long() * self.block_size + place % self.block_size

    @staticmethod
    def bytes_per_token(config, dtype) -> int:
        return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize
