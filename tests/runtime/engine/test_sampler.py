"""Sampling: order and edge cases of penalty, temperature, top-k and top-p."""

from types import SimpleNamespace

import pytest
import torch

from runtime.common.errors import ToolkitError
from runtime.engine.sampler import discourage, min_p, nucleus, penalise, sample, top_k


def settings(**changed):
    return SimpleNamespace(
        **{
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **changed,
        }
    )


def draw(logits, n=2000, **changed):
    generator = torch.Generator().manual_seed(0)
    nothing = torch.tensor([], dtype=torch.long)
    return torch.tensor(
        [sample(logits, nothing, nothing, settings(**changed), generator) for _ in range(n)]
    )


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


def test_openai_penalties_count_the_answer_alone():
    """Against the formula of OpenAI's documentation, token by token; repetition_penalty looks at
    the prompt too."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.tensor([0, 1, 1, 5])
    answer = torch.tensor([2, 3, 2, 2, 9])
    logits = torch.randn(12, generator=generator) * 3
    seen = torch.cat((prompt, answer))
    got = discourage(penalise(logits, seen, 1.7), answer, 0.6, -0.4)
    for i, logit in enumerate(logits.tolist()):
        if i in seen.tolist():
            logit = logit / 1.7 if logit > 0 else logit * 1.7
        count = answer.tolist().count(i)
        assert float(got[i]) == pytest.approx(logit - 0.6 * (count > 0) + 0.4 * count, abs=1e-5)
    assert discourage(logits, answer, 0, 0) is logits


def test_penalties_decide_greedy_answers_too():
    logits = torch.tensor([1.0, 0.9, 0.0])
    seen = torch.tensor([0, 0])
    for changed, best in (
        ({}, 0),
        ({"presence_penalty": 0.2}, 1),
        ({"frequency_penalty": 0.06}, 1),
        ({"frequency_penalty": 0.04}, 0),
        ({"presence_penalty": -2}, 0),
    ):
        assert sample(logits, seen, seen, settings(temperature=0, **changed), None) == best
        assert sample(logits, seen, seen[:0], settings(temperature=0, **changed), None) == 0, (
            "the prompt does not count"
        )


def test_min_p_is_a_share_of_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for p, kept in ((0, 4), (0.09, 4), (0.11, 3), (0.31, 2), (0.61, 1), (1, 1)):
        assert int(torch.isfinite(min_p(logits, p)).sum()) == kept
    assert set(draw(logits, n=300, min_p=0.5).tolist()) == {0, 1}
    assert set(draw(logits, n=300, min_p=0.5, temperature=0.2).tolist()) == {0}, (
        "behind the temperature, as in vLLM"
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-5, 100.0])
@pytest.mark.parametrize("top_p", [5e-324, 1e-9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 5e-324, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_the_ends_of_every_range_give_a_token(temperature, top_p, min_p, top_k):
    logits = torch.tensor([1e4, 1e4, -1e4, 0.0, -2.0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 0, 2, 3])
    for penalty, presence in ((0.01, 2.0), (100.0, -2.0)):
        chosen = settings(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            top_k=top_k,
            repetition_penalty=penalty,
            presence_penalty=presence,
            frequency_penalty=-presence,
        )
        assert 0 <= sample(logits, ids, ids[1:], chosen, generator) < len(logits)
