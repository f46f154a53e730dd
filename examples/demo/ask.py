"""Draws a scene of an unseen seed and asks the demo model about it, once in each language, through the Python API.

python examples/demo/ask.py --model examples/demo/checkpoint --seed 7 --out out/demo
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from questions import KINDS, LANGUAGES, ask
from rich.console import Console
from scenes import draw_pil, sample_scene

from runtime import Engine, SamplingParams

UNSEEN = 10**6  # training and test seeds lie elsewhere


def pose(seed: int):
    """(scene, [(question, language)]): one question per language, of different kinds."""
    rng = np.random.default_rng([UNSEEN, seed])
    scene = sample_scene(rng)
    turns = [turn for kind in rng.permutation(KINDS) if (turn := ask(scene, kind, rng))]
    return scene, list(zip(turns, LANGUAGES))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", help="folder written by python -m convert")
    parser.add_argument("--seed", type=int, default=0, help="which scene")
    parser.add_argument("--out", type=Path, required=True, help="where scene.png goes")
    return parser.parse_args()


def main():
    args = parse()
    scene, turns = pose(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "scene.png"
    Image.fromarray(draw_pil(scene)).save(picture)

    engine = Engine(args.model, artifact=args.artifact)
    console = Console(highlight=False)
    right = True
    console.print(f"picture: {picture} (seed {args.seed})")
    for turn, language in turns:
        question = turn.question(language)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        prompt = engine.prompt([{"role": "user", "content": content}])
        [result] = engine.generate([prompt], SamplingParams(max_tokens=48))
        expected = turn.answer[language]
        line = f"  {question}  ->  [bold]{result.text}[/]"
        if result.text != expected:
            right = False
            line += f"   [red](expected {expected})[/]"
        console.print(line)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
