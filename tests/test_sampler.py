"""Sampling: order and edge cases of penalty, temperature, top-k and top-p."""
from types import SimpleNamespace

import pytest
import torch

from runtime.errors import ToolkitError
from runtime.sampler import nucleus, penalise, sample, top_k


def settings(**changed):
    return SimpleNamespace(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, **changed})


def draw(logits, n=2000, **changed):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([sample(logits, torch.tensor([], dtype=torch.long), settings(**changed), generator)
                         for _ in range(n)])


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0])
    counts = torch.bincount(draw(logits, temperature=0.7), minlength=4) / 2000
    torch.testing.assert_close(counts, (logits / 0.7).softmax(-1), atol=0.03, rtol=0)


def test_temperature_zero_takes_the_best():
    assert draw(torch.tensor([0.0, 3.0, 2.0]), n=3, temperature=0.0).tolist() == [1, 1, 1]


def test_top_k_keeps_the_k_best_and_top_p_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(top_k(logits, 2)).tolist() == [True, True, False, False]
    assert torch.isfinite(nucleus(logits, 0.5)).tolist() == [True, False, False, False]
    assert torch.isfinite(nucleus(logits, 0.51)).tolist() == [True, True, False, False]
    assert torch.isfinite(nucleus(logits, 1e-9)).tolist() == [True, False, False, False]


def test_repetition_penalty_lowers_seen_tokens_once():
    seen = torch.tensor([0, 1, 1, 1])
    assert penalise(torch.tensor([2.0, -2.0, 1.0]), seen, 2.0).tolist() == [1.0, -4.0, 1.0]


def test_nan_stops_with_a_sentence():
    with pytest.raises(ToolkitError, match="NaN or Inf"):
        draw(torch.tensor([0.0, float("nan")]), n=1)
