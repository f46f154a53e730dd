"""A sequence in the KV cache, and the parts of it that one pass of the decoder computes."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sequence:
    """One prompt and its answer so far.

    block_table: the cache blocks that it holds, in the order of its tokens. num_computed_tokens:
    tokens whose keys and values are in them. token_ids: of the answer.
    """

    prompt: object
    block_table: list[int]
    num_computed_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt.ids) + len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.num_tokens - self.num_computed_tokens

    def ids(self, start: int, end: int) -> np.ndarray:
        """Token ids of [start, end), int64 [end - start]."""
        prompt_length = len(self.prompt.ids)
        answer = self.token_ids[max(start - prompt_length, 0) : max(end - prompt_length, 0)]
        return np.concatenate((self.prompt.ids[start:end], np.array(answer, dtype=np.int64)))

    def positions(self, start: int, end: int) -> np.ndarray:
        """Rotary positions of the prompt and answer tokens [start, end), int64 [end - start,
        channels]."""
        layout = self.prompt.layout
        prompt_length = len(self.prompt.ids)
        later = np.arange(max(start, prompt_length), end)[:, None] - prompt_length
        answer = np.array(layout.next_position) + later * np.array(layout.position_step)
        return np.concatenate((layout.positions[start : min(end, prompt_length)], answer))


@dataclass
class Chunk:
    """The next tokens of a sequence to be computed: those up to `end`.

    features: float32 [rows, hidden] of every image of the prompt; None once the images lie behind.
    all_logits: whether the logits of all its tokens are wanted, not those of the last alone.
    """

    sequence: Sequence
    end: int
    features: list[np.ndarray] | None = None
    all_logits: bool = False

    def spans(self) -> list["Span"]:
        """At most one span of a prefix-LM context, then at most one causal span."""
        start = self.sequence.num_computed_tokens
        context = self.sequence.prompt.layout.bidirectional
        spans = [
            Span(self, start, min(context, self.end), causal=False),
            Span(self, max(start, context), self.end, causal=True),
        ]
        return [span for span in spans if span.start < span.end]


@dataclass
class Span:
    """Tokens [start, end) of a chunk. causal: each sees itself and what is before it; else all see
    each other."""

    chunk: Chunk
    start: int
    end: int
    causal: bool

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence

    @property
    def ids(self) -> np.ndarray:
        return self.sequence.ids(self.start, self.end)

    @property
    def positions(self) -> np.ndarray:
        return self.sequence.positions(self.start, self.end)

    def image_rows(self) -> list[tuple[int, np.ndarray]]:
        """(offset in the span, float32 [rows, hidden]) of the image features that fall into it."""
        image_starts = self.sequence.prompt.layout.image_starts
        found = []
        for first, rows in zip(image_starts, self.chunk.features or ()):
            start = max(self.start, first)
            end = min(self.end, first + len(rows))
            if start < end:
                found.append((start - self.start, rows[start - first : end - first]))
        return found


@dataclass
class Pass:
    """Spans that go through the decoder together, as one Step."""

    spans: list[Span]
    causal: bool


def passes_of(chunks: list[Chunk]) -> list[Pass]:
    """Each prefix-LM context is a pass of its own; all causal spans together are the last pass."""
    passes = []
    causal = []
    for chunk in chunks:
        for span in chunk.spans():
            if span.causal:
                causal.append(span)
            else:
                passes.append(Pass([span], causal=False))
    if causal:
        passes.append(Pass(causal, causal=True))
    return passes
