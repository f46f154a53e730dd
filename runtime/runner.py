"""Runs the decoder over sequences: builds each step's positions, slots and lengths, splices in picture rows.

What `compute` gets is all that the decoder needs, so that other devices can compute their part of it from the same.
"""
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
    def __init__(self, decoder, cache, graphs=None, team=None):
        """graphs: recorded decode steps (graph.DecodeGraphs) or None. team: parallel.Team of a split decoder or None."""
        self.decoder, self.cache, self.graphs, self.team = decoder, cache, graphs, team
        self._device = decoder.embedding.device

    def prefill(self, sequence: Sequence, features=None, all_logits=False) -> torch.Tensor:
        """Run the whole prompt. features float32 [pictures, rows, hidden] or None.

        Returns float32 logits [1, vocab] of the last token, or [T, vocab] with `all_logits`, on the host.
        A prefix-LM context runs first, seeing itself both ways; what follows it is causal.
        """
        prompt = sequence.prompt
        context, total = prompt.layout.bidirectional, len(prompt.ids)
        spans = [(a, b, causal) for a, b, causal in ((0, context, False), (context, total, True)) if a < b]
        steps = [self._step([sequence], [b - a], causal) for a, b, causal in spans]
        pictures = list(zip(prompt.layout.image_starts, features if features is not None else ()))
        return self._compute_together(torch.from_numpy(prompt.ids), pictures, steps, all_logits)

    def decode(self, sequences: list[Sequence], token_ids: list[int]) -> torch.Tensor:
        """One token per sequence -> float32 logits [B, vocab] of the next, on the host."""
        step = self._step(sequences, [1] * len(sequences), causal=True)
        return self._compute_together(torch.tensor(token_ids), [], [step])

    def _compute_together(self, *work) -> torch.Tensor:
        if self.team is None:
            return self.compute(*work)
        with self.team.in_step():
            self.team.send(("compute", work))
            return self.compute(*work)

    @torch.inference_mode()
    def compute(self, ids, pictures, steps: list[Step], all_logits=False) -> torch.Tensor:
        """ids int64 [T], pictures [(first row, float32 [rows, hidden])], steps on the host, one after another, that make
        up T tokens -> float32 logits on the host: of the last step's last token of every sequence, or of all T."""
        if self.graphs and not self.decoder.tap and steps[0].q_lens == [1] * len(ids) and self.graphs.fits(len(ids)):
            return self.graphs.run(ids, steps[0]).cpu()
        x = self.decoder.embed(ids.to(self._device))
        for start, rows in pictures:
            x[start:start + len(rows)] = torch.from_numpy(rows).to(x)
        hidden = [self._forward(part, step) for part, step in zip(x.split([len(s.slots) for s in steps]), steps)]
        last = len(steps[-1].q_lens)        # one sequence with its prompt, or one token of each
        return self.decoder.logits(torch.cat(hidden) if all_logits else hidden[-1][-last:]).cpu()

    def _forward(self, x, step):
        return self.decoder.forward(x, self.decoder.ops.begin(step, self.decoder.config, self._device), self.cache)

    def _step(self, sequences, q_lens, causal) -> Step:
        """The next `q_lens` tokens of the sequences as a step on the host; the sequences are longer afterwards."""
        spans = [(s, s.length, s.length + n) for s, n in zip(sequences, q_lens)]
        positions = np.concatenate([s.positions(a, b) for s, a, b in spans])
        cos, sin = self.decoder.angles(torch.from_numpy(positions))
        slots = torch.cat([self.cache.slots(s.table, a, b) for s, a, b in spans])
        for sequence, count in zip(sequences, q_lens):
            sequence.length += count
        tables = torch.nn.utils.rnn.pad_sequence([s.table for s in sequences], batch_first=True)
        return Step(cos, sin, slots, tables, q_lens, [b for _, _, b in spans], causal)
