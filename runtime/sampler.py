"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in the order of the releases."""
import torch

from .errors import CHECK_FAILED, ToolkitError


def sample(logits: torch.Tensor, seen: torch.Tensor, settings, generator: torch.Generator) -> int:
    """logits float32 [vocab], seen int64 ids of prompt and answer so far; temperature 0 takes the most likely token."""
    if not torch.isfinite(logits).all():
        raise ToolkitError("the decoder's logits contain NaN or Inf; try --dtype float32, or compare the checkpoint with "
                           "python -m runtime.compare", CHECK_FAILED)
    logits = penalise(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    probabilities = nucleus(top_k(logits / settings.temperature, settings.top_k), settings.top_p).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def penalise(logits, seen, penalty: float):
    """Tokens seen before: positive logits divided, negative ones multiplied (Keskar et al. 2019, CTRL)."""
    if penalty == 1:
        return logits
    score = logits[seen]
    return logits.index_put((seen,), torch.where(score < 0, score * penalty, score / penalty))


def top_k(logits, k: int):
    if not 0 < k < len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], float("-inf"))


def nucleus(logits, p: float):
    """Keep the smallest set of tokens whose probability reaches p; the most likely one always stays."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.index_fill(0, order[before >= p], float("-inf"))
