"""A decoder with one layer's weights in memory at a time: for checking models that are larger than
memory.

Takes a checkpoint, returns weights whose linear layers are read when they are computed, and logits
of a whole question in one pass through the layers (two where a prompt's tokens see each other both
ways).
"""

from functools import partial

import numpy as np
import torch

from models.network.decoder import linear_of
from models.network.linear import LazyLinear
from runtime.common.progress import step_progress
from runtime.engine.sequence import Chunk

from .weights import BRANCH, decoder_rows, load_rows, read_rows, without_zero_biases


class CurrentLayerWeights:
    """Linear layers of one decoder layer at a time: of the layer that was asked for last."""

    def __init__(self, checkpoint, family, dtype: torch.dtype, ops, split):
        self.checkpoint = checkpoint
        self.family = family
        self.dtype = dtype
        self.ops = ops
        self.rows = {i: [] for i in range(family.decoder.layers)}  # of each layer's linear layers
        self.resident = []  # all other rows
        for row in decoder_rows(family, split):
            target = row.target
            if target.layer is not None and target.role in BRANCH:
                self.rows[target.layer].append(row)
            else:
                self.resident.append(row)
        self.index = None  # the layer that is in memory
        self.held = {}
        self.advance = lambda: None

    def weights(self) -> dict:
        """As `decoder_weights`, with LazyLinear ones in place of the layers' linear layers."""
        resident = load_rows(self.checkpoint, self.resident, self.dtype, "cpu", self.ops)
        weights = without_zero_biases(resident, self.family)
        for index in self.rows:
            for name in BRANCH:
                linear = LazyLinear(partial(self._linear, index, name))
                weights[f"layers.{index}.{name}"] = linear
        return weights

    def score(self, runner, sequence, features, token_ids: list[int]) -> np.ndarray:
        """Engine.score in one piece: float32 [n, vocab], row i predicts token_ids[i]."""
        sequence.token_ids.extend(token_ids[:-1])
        chunk = Chunk(sequence, sequence.num_tokens, features)
        reads = len(self.rows) * len(chunk.spans())
        with step_progress("layers", reads) as self.advance:
            logits = runner.run([chunk], all_logits=True)
        return logits[-len(token_ids) :].numpy()

    def _linear(self, index: int, name: str):
        if index != self.index:
            self.held = {}  # before the next one is read
            self.held = read_rows(
                self.checkpoint, self.rows[index], self.dtype, "cpu", self.ops, update=ignore
            )
            self.index = index
            self.advance()
        return linear_of(self.held, f"layers.{index}.{name}")


def ignore(done: int, total: int):
    """A layer's bytes are no progress worth a bar of their own."""
