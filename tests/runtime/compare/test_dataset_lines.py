"""CEval's lines, which `python -m quant --calib` takes, as questions of --dataset."""

import json

import pytest

from runtime.common.errors import ToolkitError
from runtime.compare.dataset import read, summary

QUESTION = "2 + 2 = ?\nA. 3\nB. 4\nC. 5\nD. 6"
CHOICES = ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    "fields",
    [
        {"choices_pretokenized": CHOICES, "label": 1, "targets_pretokenized": ["B"]},
        {"choices_pretokenized": CHOICES, "label": 1},
        {"choices": CHOICES, "label": 1},
        {"label": 1},
    ],
)
def test_lines_of_ceval(fields, tmp_path):
    file = tmp_path / "ceval.jsonl"
    file.write_text(json.dumps({"id": 0, "inputs_pretokenized": QUESTION, **fields}) + "\n")
    (question,) = read(str(file))
    assert (question["prompt"], question["answer"]) == (QUESTION, "B")
    assert question["choices"] == CHOICES


@pytest.mark.parametrize("fields", [{}, {"label": 4}, {"label": "x"}])
def test_lines_without_a_known_answer(fields, tmp_path):
    file = tmp_path / "ceval.jsonl"
    file.write_text(json.dumps({"inputs_pretokenized": QUESTION, **fields}) + "\n")
    with pytest.raises(ToolkitError, match="line 1"):
        read(str(file))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": True}, '"label" is not the number of a choice, from 0 to 3'),
        ({"label": 1.0}, '"label" is not the number'),
        ({"label": "1"}, '"label" is not the number'),
        ({"label": -1}, '"label" is not the number'),
        ({"choices_pretokenized": ["a", "b"], "label": 2}, "from 0 to 1"),
        ({"choices_pretokenized": "AB", "label": 0}, '"choices" is not a list of texts'),
        ({"choices_pretokenized": {"A": "a"}, "label": 0}, '"choices" is not a list of texts'),
        ({"targets_pretokenized": "abc"}, 'no "answer" text'),
        ({"targets_pretokenized": [5]}, 'no "answer" text'),
        ({"answer": " "}, 'no "answer" text'),
        ({"answer": 5}, 'no "answer" text'),
        ({"answer": 5, "choices": [5, 6]}, '"choices" is not a list of texts'),
        ({"answer": "a", "choices": "abc"}, '"choices" is not a list of texts'),
        ({"answer": "a", "choices": ["a", None]}, '"choices" is not a list of texts'),
        ({"answer": "A", "choices": ["a", "b"]}, '"answer" is none of the choices'),
    ],
)
def test_fields_of_another_type_are_named(fields, words, tmp_path):
    file = tmp_path / "ceval.jsonl"
    file.write_text(json.dumps({"inputs_pretokenized": QUESTION, **fields}) + "\n")
    with pytest.raises(ToolkitError, match="line 1, question 1") as caught:
        read(str(file))
    assert words in str(caught.value)


def test_a_choice_with_a_blank_in_front_can_be_right():
    questions = [{"prompt": "x", "answer": " a", "choices": [" a", " b"]}]
    found = summary("f", questions, [" a"], [" b"])
    assert (found["reference"], found["candidate"]) == (1, 0)
