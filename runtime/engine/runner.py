"""Runs the decoder over sequences: builds each step's positions, slots and lengths, splices in picture rows.

What `compute` gets is all that the decoder needs, so that other devices can compute their part of it from the same.
"""

import numpy as np
import torch

from models.network.decoder import Step

from .sequence import Chunk, Sequence


class Runner:
    def __init__(self, decoder, cache, graphs=None, team=None):
        """graphs: recorded decode steps (graph.DecodeGraphs) or None. team: parallel.Team of a split decoder or None."""
        self.decoder = decoder
        self.cache = cache
        self.graphs = graphs
        self.team = team
        self._device = decoder.embedding.device

    def prefill(self, sequence: Sequence, features=None, all_logits=False) -> torch.Tensor:
        """The whole prompt in one piece -> float32 logits [1, vocab] of the last token, or [T, vocab] with `all_logits`."""
        return self.run([Chunk(sequence, len(sequence.prompt.ids), features)], all_logits)

    def decode(self, sequences: list[Sequence], token_ids: list[int]) -> torch.Tensor:
        """One token more per sequence -> float32 logits [B, vocab] of the next, on the host."""
        for sequence, token in zip(sequences, token_ids):
            sequence.token_ids.append(token)
        return self.run([Chunk(sequence, sequence.length + 1) for sequence in sequences])

    def run(self, chunks: list[Chunk], all_logits=False) -> torch.Tensor:
        """Compute the chunks together; their sequences are longer afterwards.

        Returns float32 logits on the host, [B, vocab] of every chunk's last token, or of all tokens of one chunk. A
        prefix-LM context is one step of its own, seeing itself both ways; all the rest is one causal step.
        """
        both, causal = ([(c, *span) for c in chunks for span in c.spans()[i]] for i in (0, 1))
        groups = [[part] for part in both] + [causal] * bool(causal)
        parts = [part for group in groups for part in group]
        ids = torch.from_numpy(np.concatenate([c.sequence.ids(a, b) for c, a, b in parts]))
        last = {}
        pictures = []
        row = 0
        for chunk, a, b in parts:
            pictures += _rows_between(chunk, a, b, row)
            row += b - a
            last[id(chunk)] = row - 1
        rows = None if all_logits else torch.tensor([last[id(chunk)] for chunk in chunks])
        logits = self._compute_together(
            ids, pictures, [self._step(group, group is causal) for group in groups], rows
        )
        for chunk in chunks:  # not before: Ctrl-C may come in between
            chunk.sequence.length = chunk.end
        return logits

    def _compute_together(self, *work) -> torch.Tensor:
        if self.team is None:
            return self.compute(*work)
        with self.team.in_step():
            self.team.send(("compute", work))
            return self.compute(*work)

    @torch.inference_mode()
    def compute(self, ids, pictures, steps: list[Step], rows=None) -> torch.Tensor:
        """ids int64 [T], pictures [(first row, float32 [rows, hidden])], steps on the host, one after another, that make
        up T tokens -> float32 logits on the host of the tokens `rows` (None: of all)."""
        if (
            self.graphs
            and not self.decoder.tap
            and steps[0].q_lens == [1] * len(ids)
            and self.graphs.fits(len(ids))
        ):
            return self.graphs.run(ids, steps[0]).cpu()
        x = self.decoder.embed(ids.to(self._device))
        for start, values in pictures:
            x[start : start + len(values)] = torch.from_numpy(values).to(x)
        hidden = [
            self._forward(part, step)
            for part, step in zip(x.split([len(s.slots) for s in steps]), steps)
        ]
        hidden = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        if rows is not None and len(rows) < len(ids):
            hidden = hidden.index_select(0, rows.to(self._device))
        return self.decoder.logits(hidden).cpu()

    def _forward(self, x, step):
        return self.decoder.forward(
            x, self.decoder.ops.begin(step, self.decoder.config, self._device), self.cache
        )

    def _step(self, parts, causal: bool) -> Step:
        """Parts (chunk, start, end) as a step on the host."""
        spans = [(chunk.sequence, a, b) for chunk, a, b in parts]
        cos, sin = self.decoder.angles(
            torch.from_numpy(np.concatenate([s.positions(a, b) for s, a, b in spans]))
        )
        slots = torch.cat([self.cache.slots(s.blocks, a, b) for s, a, b in spans])
        tables = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(s.blocks, dtype=torch.int32) for s, _, _ in spans], batch_first=True
        )
        return Step(
            cos, sin, slots, tables, [b - a for _, a, b in spans], [b for _, _, b in spans], causal
        )


def _rows_between(chunk: Chunk, start: int, end: int, row: int) -> list[tuple[int, np.ndarray]]:
    """What of the chunk's pictures falls into its tokens [start, end), which lie at `row` of the packed tokens."""
    found = []
    for first, values in zip(chunk.sequence.prompt.layout.image_starts, chunk.features or ()):
        a = max(start, first)
        b = min(end, first + len(values))
        if a < b:
            found.append((row + a - start, values[a - first : b - first]))
    return found
