"""Sampling: takes logits, returns the next token.

Penalties, temperature, min-p, top-k and top-p are applied in vLLM's order, which is also the
releases'.
"""

import math

import torch

from runtime.common.errors import CHECK_FAILED, ToolkitError

# A temperature below it takes the most likely token, as in vLLM; logits divided by it would overflow.
GREEDY = 1e-5


def sample(
    logits: torch.Tensor,
    seen: torch.Tensor,
    answer: torch.Tensor,
    settings,
    generator: torch.Generator,
) -> int:
    """The id of the next token; with temperature 0 the most likely one.

    logits float32 [vocab]; seen int64: ids of prompt and answer so far; answer int64: of the answer
    alone. ToolkitError for NaN or Inf.
    """
    check_finite(logits)
    logits = penalise(logits, seen, settings.repetition_penalty)
    logits = discourage(logits, answer, settings.presence_penalty, settings.frequency_penalty)
    if settings.temperature < GREEDY:
        return int(logits.argmax())
    logits = min_p(logits / settings.temperature, settings.min_p)
    probabilities = nucleus(top_k(logits, settings.top_k), settings.top_p).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def check_finite(logits: torch.Tensor):
    """ToolkitError for NaN or Inf."""
    smallest, largest = logits.aminmax()  # each is NaN if there is one
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ToolkitError(
            "the decoder's logits contain NaN or Inf; try --dtype float32, or compare the checkpoint with "
            "python -m runtime.compare",
            CHECK_FAILED,
        )


def penalise(logits, seen, penalty: float):
    """Tokens seen before: positive logits divided, negative ones multiplied (Keskar et al. 2019,
    CTRL)."""
    if penalty == 1:
        return logits
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))


def discourage(logits, answer, presence: float, frequency: float):
    """OpenAI's penalties: tokens that the answer has lose `presence` once, and `frequency` for
    every time they stand there."""
    if presence == frequency == 0:
        return logits
    counts = torch.bincount(answer, minlength=len(logits))
    return logits - presence * (counts > 0) - frequency * counts


def min_p(logits, p: float):
    """Drop what is less likely than p times the likeliest (Nguyen et al. 2024)."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(p), float("-inf"))


def top_k(logits, k: int):
    """Keep the k most likely tokens; 0 keeps all."""
    if not 0 < k < len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], float("-inf"))


def nucleus(logits, p: float):
    """Keep the smallest set of tokens whose probability reaches p; the most likely one always
    stays."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all that are more likely
    return logits.index_fill(0, order[1:][before[1:] >= p], float("-inf"))
