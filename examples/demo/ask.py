"""Draw a scene nobody has seen and ask the demo model about it, once in each language, through the public Python API.

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
    """(scene, one question per language, of different kinds) of an unseen seed."""
    rng = np.random.default_rng([UNSEEN, seed])
    scene = sample_scene(rng)
    turns = [turn for kind in rng.permutation(KINDS) if (turn := ask(scene, kind, rng))]
    return scene, list(zip(turns, LANGUAGES))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", help="folder written by python -m convert")
    parser.add_argument("--seed", type=int, default=0, help="which scene")
    parser.add_argument("--out", type=Path, required=True, help="where scene.png goes")
    args = parser.parse_args()
    scene, turns = pose(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "scene.png"
    Image.fromarray(draw_pil(scene)).save(picture)

    engine = Engine(args.model, artifact=args.artifact)
    console = Console(highlight=False)
    right = True
    console.print(f"picture: {picture} (seed {args.seed})")
    for turn, language in turns:
        content = [
            {"type": "image", "image": picture},
            {"type": "text", "text": turn.question(language)},
        ]
        result = engine.generate(
            [engine.prompt([{"role": "user", "content": content}])], SamplingParams(max_tokens=48)
        )[0]
        expected = turn.answer[language]
        right &= result.text == expected
        console.print(
            f"  {turn.question(language)}  ->  [bold]{result.text}[/]"
            + ("" if result.text == expected else f"   [red](expected {expected})[/]")
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
