"""Measures the exact-match accuracy of a demo checkpoint per question kind and language, greedy, on unseen scenes.

python examples/demo/evaluate.py --checkpoint examples/demo/checkpoint --scenes 200 --renderer pil
"""

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from batches import cut, pack, splice
from net import ROWS, load_release, see
from PIL import Image
from questions import KINDS, LANGUAGES, ask
from scenes import draw_pil, draw_sdf, sample_scene
from tokenizer import Tokenizer

UNSEEN = 999  # the first number of every test seed; training seeds begin with train.SEED
RENDERERS = {"sdf": draw_sdf, "pil": draw_pil, "hard": lambda scene: draw_pil(scene, scale=1)}


def test_scene(seed: int, integer: bool = False):
    rng = np.random.default_rng([UNSEEN, seed])
    scene = sample_scene(rng, integer)
    turns = [turn for turn in (ask(scene, kind, rng) for kind in KINDS) if turn]
    return scene, turns


@torch.no_grad()
def look(tower, pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, 224, 224, 3] -> image rows [B, 32, hidden]."""
    return see(tower, torch.from_numpy(cut(pictures)))[0]


@torch.no_grad()
def answers(decoder, tokenizer, rows, questions, limit=16) -> list[str]:
    """Greedy answers to (image index, question, language); runs the whole sequence again for every token."""
    prompts = [tokenizer.prompt(text, language, ROWS) for _, text, language in questions]
    written = [[] for _ in prompts]
    open_ones = list(range(len(prompts)))
    owners = torch.tensor([index for index, _, _ in questions])
    for _ in range(limit):
        turns = [(prompts[i][0], prompts[i][1], written[i] + [0]) for i in open_ones]
        ids, positions, context, labels = pack(turns, tokenizer.ids["pad_token_id"])
        hidden = decoder(
            splice(decoder, ids, turns[0][1], rows[owners[open_ones]]), positions, context
        )
        last = (labels >= 0).float().cumsum(1).argmax(1)
        best = decoder.lm_head(hidden[torch.arange(len(turns)), last]).argmax(-1).tolist()
        for i, token in zip(open_ones, best):
            written[i].append(token)
        open_ones = [i for i in open_ones if written[i][-1] != tokenizer.ids["eos_token_id"]]
        if not open_ones:
            break
    return [
        tokenizer.decode([t for t in ids if t != tokenizer.ids["eos_token_id"]]) for ids in written
    ]


def score(tower, decoder, tokenizer, scenes, renderer, first=0, batch=25):
    """({(kind, language): [right, asked]}, wrong answers as (seed, question, expected, answer))."""
    counts = defaultdict(lambda: [0, 0])
    wrong = []
    for start in range(first, first + scenes, batch):
        seeds = range(start, min(start + batch, first + scenes))
        drawn = [test_scene(seed, integer=seed % 3 == 0) for seed in seeds]
        rows = look(tower, np.stack([renderer(scene) for scene, _ in drawn]))
        asked = []
        for i, (_, turns) in enumerate(drawn):
            asked += [(i, turn, lang) for turn, lang in product(turns, LANGUAGES)]
        questions = [(i, turn.question(lang), lang) for i, turn, lang in asked]
        replies = answers(decoder, tokenizer, rows, questions)
        for (i, turn, lang), reply in zip(asked, replies):
            right = reply == turn.answer[lang]
            counts[turn.kind, lang][0] += right
            counts[turn.kind, lang][1] += 1
            if not right:
                wrong.append((start + i, turn.question(lang), turn.answer[lang], reply))
    return counts, wrong


def report(counts) -> str:
    """The table of `counts`, as text."""
    lines = ["kind         " + "".join(f"{lang:>16}" for lang in LANGUAGES)]
    for kind in (*KINDS, "all"):
        cells = [accuracy_cell(counts, kind, lang) for lang in LANGUAGES]
        lines.append(f"{kind:13}" + "".join(cells))
    return "\n".join(lines)


def accuracy_cell(counts, kind, language) -> str:
    right = 0
    asked = 0
    for (other_kind, other_language), (some_right, some_asked) in counts.items():
        if other_language == language and kind in (other_kind, "all"):
            right += some_right
            asked += some_asked
    return f"{100 * right / max(asked, 1):8.2f}% {asked:6d}"


def write_samples(folder: Path, count=3) -> None:
    """Writes sample images and questions.jsonl, all of unseen seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(10_000, 10_000 + count):
        scene, turns = test_scene(seed)
        Image.fromarray(draw_pil(scene)).save(folder / f"scene{seed}.png")
        for turn, lang in product(turns, LANGUAGES):
            line = {
                "image": f"scene{seed}.png",
                "prompt": turn.question(lang),
                "answer": turn.answer[lang],
                "lang": lang,
                "kind": turn.kind,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="first test seed")
    parser.add_argument("--renderer", choices=RENDERERS, default="pil")
    parser.add_argument("--wrong", type=int, default=0, help="print this many wrong answers")
    parser.add_argument(
        "--samples", type=Path, help="write sample pictures and questions.jsonl here and stop"
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    if args.samples:
        write_samples(args.samples)
        return
    _, tower, decoder = load_release(args.checkpoint)
    renderer = RENDERERS[args.renderer]
    tokenizer = Tokenizer(args.checkpoint)
    counts, wrong = score(tower, decoder, tokenizer, args.scenes, renderer, args.first)
    print(report(counts))
    for line in wrong[: args.wrong]:
        print(*line, sep=" | ")


if __name__ == "__main__":
    main()
