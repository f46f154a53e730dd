"""`make bench-neighbours`: what is judged, and what is not."""

from argparse import Namespace

import neighbours
import pytest

LIMITS = Namespace(at_least=0.4, unchanged=0.95, against="abc1234")


@pytest.mark.parametrize(
    "others, ratio, unchanged, expected, sentence",
    [
        ([0.01, 0.02, 0.3], 0.41, 0.96, 0, ""),
        ([0.2, 0.01, 0.3], 0.1, 0.5, neighbours.NOT_IDLE, "other work took 20%"),
        ([0.0], 0.39, 1.0, neighbours.FAILED, "0.39 is below 0.4"),
        ([0.0], 0.5, 0.94, neighbours.FAILED, "slower than abc1234: 0.94"),
    ],
)
def test_a_row_is_judged_on_an_idle_machine_alone(
    others, ratio, unchanged, expected, sentence, capsys
):
    found = {"others": others, "ratio": ratio, "then": [1.0], "unchanged": unchanged}
    assert neighbours.judge(found, LIMITS) == expected
    assert sentence in capsys.readouterr().out


def test_without_another_commit_nothing_is_compared():
    found = {"others": [0.0], "ratio": 0.5, "then": [], "unchanged": None}
    assert neighbours.judge(found, LIMITS) == 0
    assert neighbours.median_ratio([], []) is None


def test_ratios_are_those_of_each_round():
    assert neighbours.median_ratio([5, 1, 8], [10, 10, 10]) == 0.5


def test_loops_use_processors_and_end():
    before = neighbours.busy_seconds()
    with neighbours.busy_loops(1):
        while neighbours.busy_seconds() - before < 0.05:
            pass
