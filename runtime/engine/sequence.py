"""A sequence in the KV cache, and the part of it that one pass computes."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sequence:
    """One prompt and its answer inside the cache. `length` = tokens whose keys and values are cached, in `blocks`."""

    prompt: object
    blocks: list[int]
    length: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt.ids) + len(self.token_ids)

    def ids(self, start: int, end: int) -> np.ndarray:
        """Tokens int64 [end - start]."""
        count = len(self.prompt.ids)
        answer = self.token_ids[max(start - count, 0) : max(end - count, 0)]
        return np.concatenate((self.prompt.ids[start:end], np.array(answer, dtype=np.int64)))

    def positions(self, start: int, end: int) -> np.ndarray:
        """Rotary positions int64 [end - start, channels] of prompt and answer tokens."""
        layout = self.prompt.layout
        prompt_length = len(self.prompt.ids)
        later = np.arange(max(start, prompt_length), end)[:, None] - prompt_length
        answer = np.array(layout.next_position) + later * np.array(layout.position_step)
        return np.concatenate((layout.positions[start : min(end, prompt_length)], answer))


@dataclass
class Chunk:
    """The next tokens of a sequence to be computed: up to `end`. features: float32 [rows, hidden] of every picture of
    the prompt, or None behind the pictures."""

    sequence: Sequence
    end: int
    features: list[np.ndarray] | None = None

    def spans(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Token ranges (seen both ways, causal), each of at most one."""
        start = self.sequence.length
        context = self.sequence.prompt.layout.bidirectional
        both = (start, min(context, self.end))
        causal = (max(start, context), self.end)
        return [[span] * (span[0] < span[1]) for span in (both, causal)]
