"""The paged key/value cache: takes numbers of tokens, returns blocks to hold their keys and values.

A full block may be remembered under a key that says what its tokens and all before them are; a
later sequence that begins the same finds it, in use or free, until the block is given to another
sequence (least recently used first).
"""

from collections import OrderedDict

import torch


class KVCache:
    """layers: per layer a pair of tensors, keys and values, in the layout of the operators `ops`.

    A slot, block * block_size + offset, names one token's place in whatever layout.
    """

    def __init__(self, config, blocks: int, block_size: int, dtype, device, ops):
        self.block_size = block_size
        self.layers = [
            tuple(ops.cache(config, blocks, block_size, dtype, device) for _ in "kv")
            for _ in range(config.layers)
        ]
        self._free = OrderedDict.fromkeys(range(blocks))
        self._num_users = [0] * blocks  # sequences that use a block
        self._key_of = {}
        self._block_of = {}

    def take_memory(self):
        """Write all of it once: the system gives memory only to what was written."""
        for keys, values in self.layers:
            keys.zero_()
            values.zero_()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return len(self._num_users) - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, tokens: int) -> list[int]:
        """Blocks for `tokens` tokens; the caller has checked `free_blocks`."""
        return [self._take_free_block() for _ in range(self.blocks_for(tokens))]

    def release(self, blocks: list[int]):
        """A sequence no longer needs `blocks`.

        Blocks without a key are reused first, which keeps a sequence's blocks contiguous; of those
        with a key, a sequence's last ones.
        """
        for block in reversed(blocks):
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, key: bytes):
        """Let `find` return a full `block` under `key`, unless another block has that key."""
        if key not in self._block_of:
            self._forget(block)
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, keys: list[bytes]) -> list[int]:
        """The blocks of the longest run of remembered `keys` from the first on, without taking
        them."""
        found = []
        for key in keys:
            if key not in self._block_of:
                break
            found.append(self._block_of[key])
        return found

    def forget(self, blocks: list[int]):
        """Let `find` return none of `blocks` any more."""
        for block in blocks:
            self._forget(block)

    def share(self, blocks: list[int]):
        """One more sequence uses `blocks`, which `find` gave."""
        for block in blocks:
            self._num_users[block] += 1
            self._free.pop(block, None)

    def free_among(self, blocks: list[int]) -> int:
        """How many of `blocks` no sequence uses."""
        return sum(not self._num_users[block] for block in blocks)

    def slots(self, blocks: list[int], start: int, end: int) -> torch.Tensor:
        """Cache slots int64 of the token range [start, end) of a sequence."""
        tokens = torch.arange(start, end)
        first_slots = torch.tensor(blocks)[tokens // self.block_size] * self.block_size
        return first_slots + tokens % self.block_size

    def _take_free_block(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._num_users[block] = 1
        return block

    def _forget(self, block: int):
        if block in self._key_of:
            del self._block_of[self._key_of.pop(block)]

    @staticmethod
    def bytes_per_token(config, dtype) -> int:
        return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize
