"""The demo model really looks: scenes of another program (other_scenes.py), through the public API."""

from collections import Counter

import other_scenes
import pytest
from demo_model import DEMO, answers
from PIL import Image

from runtime import Engine

SCENES = 40
LEAST = 0.95


@pytest.fixture(scope="module")
def engine():
    return Engine(DEMO, dtype="float32", vision="torch")


@pytest.mark.parametrize("language, wrapper", [("en", "en"), ("en", "zh"), ("zh", "zh")])
def test_exact_answers_about_unseen_scenes(engine, language, wrapper):
    right = Counter()
    wrong = []
    for seed in range(SCENES):
        things, rng = other_scenes.scene(f"{language}{seed}")
        picture = Image.fromarray(other_scenes.draw(things, rng))
        turns = other_scenes.questions(things, rng)
        asked = [(picture, question[language]) for _, question, _ in turns]
        for (_, question, answer), text in zip(turns, answers(engine, asked, wrapper)):
            right[text == answer[language]] += 1
            if text != answer[language]:
                wrong.append((seed, question[language], answer[language], text))
    assert right.total() > 6 * SCENES
    assert right[True] >= LEAST * right.total(), wrong


def test_the_same_question_on_a_changed_picture_changes_the_answer(engine):
    thing = {"shape": "circle", "size": "large", "r": 29, "at": (110.5, 97.25)}
    pictures = {}
    for color in other_scenes.COLORS:
        things = [{**thing, "color": color}]
        rng = other_scenes.scene(7)[1]
        pictures[color] = Image.fromarray(other_scenes.draw(things, rng))
    texts = answers(
        engine, [(picture, "What color is the circle?") for picture in pictures.values()], "en"
    )
    assert dict(zip(pictures, texts)) == {color: color for color in pictures}
