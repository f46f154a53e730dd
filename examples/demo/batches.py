"""Makes training batches: scenes and patches from a step's own seed, questions as packed token sequences."""

import numpy as np
import torch
from net import ROWS
from questions import KINDS, LANGUAGES, SHAPE, ask
from scenes import draw_mixed, sample_scene
from targets import PATCH
from torch.nn import functional as F

SEED = 1
FULLNESS = (0.1, 0.2, 0.3, 0.4)  # share of scenes with 1, 2, 3, 4 objects
WEIGHTS = {
    "relation": 3.0,
    "extreme": 2.0,
    "count_shape": 2.0,
    "describe": 1.5,
    "size": 1.5,
    "exists": 1.5,
}


def stream(stage: int, step: int, rank: int) -> np.random.Generator:
    """Each step draws from its own seed, so a resumed run sees what an uninterrupted one would."""
    return np.random.default_rng([SEED, stage, step, rank])


def draw_scenes(rng, count):
    """Scenes with more objects than the grammar's on average: sorting three or four takes longest to learn."""
    scenes = []
    for _ in range(count):
        integer = rng.random() < 0.3
        things = int(rng.choice(4, p=FULLNESS)) + 1
        scenes.append(sample_scene(rng, integer, things))
    return scenes


def cut(pictures: np.ndarray) -> np.ndarray:
    """[B, 224, 224, 3] -> patches [B, 256, 14, 14, 3] in row-major order."""
    grid = pictures.reshape(len(pictures), 16, PATCH, 16, PATCH, 3)
    return grid.swapaxes(2, 3).reshape(len(pictures), 256, PATCH, PATCH, 3)


def draw_patches(scenes, rng, owner, keep_count):
    """Patches of the drawn scenes: all of them, or `keep_count` with those under objects first."""
    patches = cut(np.stack([draw_mixed(scene, rng) for scene in scenes]))
    if keep_count >= 256:
        return torch.from_numpy(patches), None
    urgency = rng.random(owner.shape) + 0.8 * (owner >= 0)
    keep = np.argsort(-urgency, axis=1)[:, :keep_count]
    return torch.from_numpy(np.take_along_axis(patches, keep[..., None, None, None], axis=1)), keep


def num_patches(step, args):
    """Few patches in most steps; all in every fourth and in the last ones, because attention must learn the whole grid."""
    if step % 4 == 0 or step >= args.steps * args.partial:
        return 256
    return args.keep


class Questions:
    """Makes batches of tokenised turns; a turn is a question with its answer."""

    def __init__(self, tokenizer, weights=WEIGHTS):
        self.tokenizer = tokenizer
        self.weights = np.array([weights.get(kind, 1.0) for kind in KINDS])
        self.weights /= self.weights.sum()
        words = ["▁" + word for word in SHAPE["en"]] + list(SHAPE["zh"])
        self.shapes = {tokenizer.pieces.piece_to_id(word) for word in words}

    def sample(self, scenes, per_scene, rng):
        """`per_scene` random turns about each scene, as three values.

        Index of the scene of each turn; (ids, start of the image rows, answer ids) of each turn; (turn, scene, two objects)
        of each relation question.
        """
        owners = []
        turns = []
        pairs = []
        for b, scene in enumerate(scenes):
            while len(turns) < (b + 1) * per_scene:
                kind = KINDS[rng.choice(len(KINDS), p=self.weights)]
                turn = ask(scene, kind, rng)
                if turn is None:
                    continue
                owners.append(b)
                if turn.pair:
                    pairs.append((len(turns), b, *turn.pair))
                language = LANGUAGES[rng.integers(2)]
                wrapper = language if rng.random() < 0.4 else "zh"
                turns.append(self.encode(turn, language, wrapper))
        return torch.tensor(owners), turns, pairs

    def marks(self, turns):
        """[turns, 3] distances before <sop>: 0, and the ends of both names in questions that name two objects."""
        back = torch.zeros(len(turns), 3, dtype=torch.int64)
        for row, (prompt, _, _) in zip(back, turns):
            names = [len(prompt) - 1 - i for i, token in enumerate(prompt) if token in self.shapes]
            if len(names) == 2:
                row[1:] = torch.tensor(names)
        return back

    def encode(self, turn, language, wrapper):
        """(ids, start of the image rows, answer ids); wrapper "zh": in the release's default form, 问：…答："""
        ids, start = self.tokenizer.prompt(turn.question(language), wrapper, ROWS)
        answer = self.tokenizer.encode(turn.answer[language])
        return ids, start, [*answer, self.tokenizer.ids["eos_token_id"]]


def layout(prompt_length: int, answer_length: int) -> np.ndarray:
    """(position, block position): <sop> and the answer stay at gMASK's position and count blocks from 1."""
    context = prompt_length - 1
    position = np.minimum(np.arange(prompt_length + answer_length), context - 1)
    block = np.maximum(np.arange(prompt_length + answer_length) - context + 1, 0)
    return np.stack((position, block), axis=1)


def pack(turns, pad):
    """Turns as right-padded ids, positions, context lengths and labels (-100: not an answer token)."""
    longest = max(len(ids) + len(answer) for ids, _, answer in turns) - 1
    ids = torch.full((len(turns), longest), pad)
    labels = torch.full_like(ids, -100)
    positions = torch.zeros(len(turns), longest, 2)
    for b, (prompt, _, answer) in enumerate(turns):
        row = torch.tensor(prompt + answer)
        ids[b, : len(row) - 1] = row[:-1]
        labels[b, len(prompt) - 1 : len(row) - 1] = torch.tensor(answer)
        positions[b, : len(row) - 1] = torch.from_numpy(layout(len(prompt), len(answer) - 1))
    return ids, positions, torch.tensor([len(p) - 1 for p, _, _ in turns]), labels


def splice(decoder, ids, start, rows):
    embedded = decoder.word_embeddings(ids)
    return torch.cat(
        (embedded[:, :start], rows.to(embedded.dtype), embedded[:, start + ROWS :]), dim=1
    )


def answer_loss(decoder, turns, rows, pad, drop=False, taps=None, marks=None):
    """Cross-entropy of the answer tokens. `drop` leaves out the unused image rows (positions kept) to save time."""
    ids, positions, context, labels = pack(turns, pad)
    start = turns[0][1]
    x = splice(decoder, ids, start, rows)
    if drop:
        keep = torch.cat((torch.arange(start + 9), torch.arange(start + ROWS, ids.shape[1])))
        x = x[:, keep]
        positions = positions[:, keep]
        labels = labels[:, keep]
        context = context - (ROWS - 9)
    hidden = decoder(x, positions, context, taps)
    if taps is not None:  # what stands at the marked tokens after each layer
        taps[:] = [tap[torch.arange(len(tap))[:, None], context[:, None] - marks] for tap in taps]
    answer = labels >= 0
    return F.cross_entropy(decoder.lm_head(hidden[answer]).float(), labels[answer])
