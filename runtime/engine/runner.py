"""Runs the decoder over sequences: takes chunks, returns logits.

Builds the positions, slots and lengths of each pass and splices in image features. What `compute`
gets is all that the decoder needs, so that other devices can compute their part of it from the same
message.
"""

from dataclasses import dataclass

import numpy as np
import torch

from models.network.decoder import Step

from .sequence import Chunk, Pass, Sequence, passes_of


@dataclass
class PackedTokens:
    """The tokens of several passes, one after another.

    ids int64 [T]; images: (first row, float32 [rows, hidden]) of image features in place of
    embeddings; rows int64: the tokens whose logits are wanted, chunk by chunk.
    """

    ids: torch.Tensor
    images: list[tuple[int, np.ndarray]]
    rows: torch.Tensor


class Runner:
    def __init__(self, decoder, cache, graphs=None, team=None):
        """graphs: recorded decode steps (DecodeGraphs) or None. team: the Team of a split decoder
        or None."""
        self.decoder = decoder
        self.cache = cache
        self.graphs = graphs
        self.team = team
        self._device = decoder.embedding.device

    def prefill(self, sequence: Sequence, features=None, all_logits=False) -> torch.Tensor:
        """The whole prompt in one piece -> float32 logits [1, vocab] of the last token, or [T,
        vocab] with `all_logits`."""
        return self.run([Chunk(sequence, len(sequence.prompt.ids), features)], all_logits)

    def decode(self, sequences: list[Sequence], token_ids: list[int]) -> torch.Tensor:
        """One token more per sequence -> float32 logits [B, vocab] of the next, on the host."""
        for sequence, token in zip(sequences, token_ids):
            sequence.token_ids.append(token)
        return self.run([Chunk(each, each.num_computed_tokens + 1) for each in sequences])

    def run(self, chunks: list[Chunk], all_logits=False) -> torch.Tensor:
        """Compute the chunks together and count their tokens as computed.

        Returns float32 logits [rows, vocab] on the host: of every chunk's last token, or of all its
        tokens where it wants them; with `all_logits` of all tokens.
        """
        passes = passes_of(chunks)
        steps = [self._step(each) for each in passes]
        packed = pack(chunks, passes)
        rows = None if all_logits else packed.rows
        logits = self._compute_together(packed.ids, packed.images, steps, rows)
        for chunk in chunks:  # not before: Ctrl-C may come in between
            chunk.sequence.num_computed_tokens = chunk.end
        return logits

    @torch.inference_mode()
    def compute(self, ids, images, steps: list[Step], rows=None) -> torch.Tensor:
        """ids int64 [T], images and rows as in PackedTokens, steps on the host that make up the T
        tokens -> float32 logits on the host, of the tokens `rows` (None: of all)."""
        if self._is_recorded(ids, steps):
            return self.graphs.run(ids, steps[0]).cpu()
        x = self.decoder.embed(ids.to(self._device))
        for start, values in images:
            x[start : start + len(values)] = torch.as_tensor(values).to(x)
        parts = x.split([len(step.slots) for step in steps])
        hidden = [self._forward(part, step) for part, step in zip(parts, steps)]
        hidden = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        if rows is not None and len(rows) < len(ids):
            hidden = hidden.index_select(0, rows.to(self._device))
        return self.decoder.logits(hidden).cpu()

    def _compute_together(self, *work) -> torch.Tensor:
        """`compute` on all devices of a split decoder."""
        if self.team is None:
            return self.compute(*work)
        with self.team.in_step():
            self.team.send("compute", **_sent(*work))
            return self.compute(*work)

    def follow(self, work: dict):
        """On ranks other than 0: compute what rank 0 sent."""
        steps = [Step(**fields) for fields in work["steps"]]
        self.compute(work["ids"], work["images"], steps, work["rows"])

    def _is_recorded(self, ids, steps) -> bool:
        """One new token per sequence, a recorded batch size, and nobody watches the layers."""
        if not self.graphs or self.decoder.tap:
            return False
        return steps[0].q_lens == [1] * len(ids) and self.graphs.fits(len(ids))

    def _forward(self, x, step):
        step = self.decoder.ops.begin(step, self.decoder.config, self._device)
        return self.decoder.forward(x, step, self.cache)

    def _step(self, each: Pass) -> Step:
        """A pass as a step on the host."""
        spans = each.spans
        positions = np.concatenate([span.positions for span in spans])
        cos, sin = self.decoder.angles(torch.from_numpy(positions))
        tables = [torch.tensor(s.sequence.block_table, dtype=torch.int32) for s in spans]
        return Step(
            cos=cos,
            sin=sin,
            slots=torch.cat(
                [self.cache.slots(s.sequence.block_table, s.start, s.end) for s in spans]
            ),
            block_table=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
            q_lens=[len(span) for span in spans],
            kv_lens=[span.end for span in spans],
            causal=each.causal,
        )


def _sent(ids, images, steps: list[Step], rows) -> dict:
    """The work of `compute` as a message holds it."""
    return {
        "ids": ids,
        "images": [(start, torch.from_numpy(values)) for start, values in images],
        "steps": [vars(step) for step in steps],
        "rows": rows,
    }


def pack(chunks: list[Chunk], passes: list[Pass]) -> PackedTokens:
    spans = [span for each in passes for span in each.spans]
    images = []
    rows_of = {id(chunk): [] for chunk in chunks}
    row = 0
    for span in spans:
        images += [(row + offset, values) for offset, values in span.image_rows()]
        rows_of[id(span.chunk)] += range(row, row + len(span))
        row += len(span)
    wanted = []
    for chunk in chunks:
        wanted += rows_of[id(chunk)] if chunk.all_logits else rows_of[id(chunk)][-1:]
    return PackedTokens(
        ids=torch.from_numpy(np.concatenate([span.ids for span in spans])),
        images=images,
        rows=torch.tensor(wanted),
    )
