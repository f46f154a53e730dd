"""Exact-match accuracy of demo checkpoints through the engine, on scenes of unseen seeds: what quantisation costs.

python benchmarks/demo_accuracy.py examples/demo/checkpoint out/demo-w8a8 --scenes 100
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]


def accuracy(model: str, scenes: int, first: int) -> dict[str, tuple[int, int]]:
    """{language: (right answers, questions)}."""
    from evaluate import test_scene
    from PIL import Image
    from questions import LANGUAGES
    from scenes import draw_pil

    from runtime import Engine, SamplingParams

    engine = Engine(model, vision="torch", max_model_len=128)
    counts = defaultdict(lambda: (0, 0))
    for seed in range(first, first + scenes):
        scene, turns = test_scene(seed, integer=seed % 3 == 0)
        picture = {"type": "image", "image": Image.fromarray(draw_pil(scene))}
        asked = [(turn, language) for turn in turns for language in LANGUAGES]
        prompts = [
            engine.prompt(
                [
                    {
                        "role": "user",
                        "content": [picture, {"type": "text", "text": turn.question(language)}],
                    }
                ],
                language=language,
            )
            for turn, language in asked
        ]
        found = engine.generate(
            prompts, SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1)
        )
        for (turn, language), result in zip(asked, found):
            right, total = counts[language]
            counts[language] = (
                right + (result.text == engine.family.clean(turn.answer[language])),
                total + 1,
            )
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="first test seed")
    options = parser.parse_args()
    for model in options.models:
        counts = accuracy(model, options.scenes, options.first)
        print(
            f"{model:40}"
            + "   ".join(
                f"{language} {100 * right / total:6.2f} % of {total}"
                for language, (right, total) in counts.items()
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
