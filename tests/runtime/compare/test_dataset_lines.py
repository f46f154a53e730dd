"""CEval's lines, which `python -m quant --calib` takes, as questions of --dataset."""

import json

import pytest

from runtime.common.errors import ToolkitError
from runtime.compare.dataset import read

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
