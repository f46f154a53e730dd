"""Measures the exact-match accuracy of demo checkpoints through the engine, e.g. before and after quantisation.

The scenes are of unseen seeds: python benchmarks/demo_accuracy.py examples/demo/checkpoint out/demo-w8a8 --scenes 100
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]

from evaluate import test_scene  # noqa: E402
from questions import LANGUAGES  # noqa: E402
from scenes import draw_pil  # noqa: E402

from runtime import Engine, SamplingParams  # noqa: E402

GREEDY = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1)


def accuracy(model: str, scenes: int, first: int) -> dict[str, tuple[int, int]]:
    """{language: (right answers, questions)} on `scenes` scenes, the first one of seed `first`."""
    engine = Engine(model, vision="torch", max_model_len=128)
    right = dict.fromkeys(LANGUAGES, 0)
    total = dict.fromkeys(LANGUAGES, 0)
    for seed in range(first, first + scenes):
        scene, turns = test_scene(seed, integer=seed % 3 == 0)
        image = Image.fromarray(draw_pil(scene))
        asked = [(turn, language) for turn in turns for language in LANGUAGES]
        prompts = [prompt_of(engine, image, turn, language) for turn, language in asked]
        for (turn, language), result in zip(asked, engine.generate(prompts, GREEDY)):
            total[language] += 1
            right[language] += result.text == engine.family.clean(turn.answer[language])
    return {language: (right[language], total[language]) for language in LANGUAGES}


def prompt_of(engine, image, turn, language: str):
    content = [{"type": "image", "image": image}, {"type": "text", "text": turn.question(language)}]
    return engine.prompt([{"role": "user", "content": content}], language=language)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="first test seed")
    options = parser.parse_args()
    for model in options.models:
        cells = []
        for language, (right, total) in accuracy(model, options.scenes, options.first).items():
            cells.append(f"{language} {100 * right / total:6.2f} % of {total}")
        print(f"{model:40}" + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
