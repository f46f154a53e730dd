"""Runs the decoder over sequences: builds each step's positions, slots and lengths, splices in picture rows."""
from dataclasses import dataclass, field

import numpy as np
import torch

from models.decoder import Step


@dataclass
class Sequence:
    """One prompt and its answer inside the cache. `length` = tokens whose keys and values are cached."""
    prompt: object
    table: torch.Tensor
    length: int = 0
    token_ids: list[int] = field(default_factory=list)

    def positions(self, start: int, end: int) -> np.ndarray:
        """Rotary positions int64 [end - start, channels] of prompt and answer tokens."""
        layout, prompt_length = self.prompt.layout, len(self.prompt.ids)
        later = np.arange(max(start, prompt_length), end)[:, None] - prompt_length
        answer = np.array(layout.next_position) + later * np.array(layout.position_step)
        return np.concatenate((layout.positions[start:min(end, prompt_length)], answer))


class Runner:
    def __init__(self, decoder, cache, graphs=None):
        """graphs: recorded decode steps (graph.DecodeGraphs) or None."""
        self.decoder, self.cache, self.graphs = decoder, cache, graphs
        self._device = decoder.embedding.device

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, features=None, all_logits=False) -> torch.Tensor:
        """Run the whole prompt. features float32 [pictures, rows, hidden] or None.

        Returns float32 logits [1, vocab] of the last token, or [T, vocab] with `all_logits`, on the host.
        A prefix-LM context runs first, seeing itself both ways; what follows it is causal.
        """
        x = self._prompt_embeddings(sequence.prompt, features)
        context, total = sequence.prompt.layout.bidirectional, len(x)
        spans = [(a, b, causal) for a, b, causal in ((0, context, False), (context, total, True)) if a < b]
        hidden = [self._forward(x[a:b], [sequence], [b - a], causal) for a, b, causal in spans]
        return self.decoder.logits(torch.cat(hidden) if all_logits else hidden[-1][-1:]).cpu()

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence], token_ids: list[int]) -> torch.Tensor:
        """One token per sequence -> float32 logits [B, vocab] of the next, on the host."""
        ids, q_lens = torch.tensor(token_ids), [1] * len(sequences)
        if self.graphs and self.graphs.fits(len(sequences)):
            logits = self.graphs.run(ids, self._step(sequences, q_lens, causal=True))
            self._advance(sequences, q_lens)
            return logits.cpu()
        x = self.decoder.embed(ids.to(self._device))
        return self.decoder.logits(self._forward(x, sequences, q_lens, causal=True)).cpu()

    def _prompt_embeddings(self, prompt, features):
        x = self.decoder.embed(torch.from_numpy(prompt.ids).to(self._device))
        for start, rows in zip(prompt.layout.image_starts, features if features is not None else ()):
            x[start:start + len(rows)] = torch.from_numpy(rows).to(x)
        return x

    def _forward(self, x, sequences, q_lens, causal):
        step = self.decoder.ops.begin(self._step(sequences, q_lens, causal), self.decoder.config, self._device)
        hidden = self.decoder.forward(x, step, self.cache)
        self._advance(sequences, q_lens)
        return hidden

    @staticmethod
    def _advance(sequences, q_lens):
        for sequence, count in zip(sequences, q_lens):
            sequence.length += count

    def _step(self, sequences, q_lens, causal) -> Step:
        """The step on the host."""
        spans = [(s, s.length, s.length + n) for s, n in zip(sequences, q_lens)]
        positions = np.concatenate([s.positions(a, b) for s, a, b in spans])
        cos, sin = self.decoder.angles(torch.from_numpy(positions))
        slots = torch.cat([self.cache.slots(s.table, a, b) for s, a, b in spans])
        tables = torch.nn.utils.rnn.pad_sequence([s.table for s in sequences], batch_first=True)
        return Step(cos, sin, slots, tables, q_lens, [b for _, _, b in spans], causal)
