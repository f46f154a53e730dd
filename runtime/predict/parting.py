"""Where two greedy answers part: takes both, returns the first token that differs, and how much
each side preferred its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parting:
    """index: of the first token that differs. tokens: each side's text there; gaps: by how much its
    logit lies above that of the other side's token there, None where that is not known."""

    index: int
    tokens: tuple[str, str]
    gaps: tuple[float | None, float | None]

    def describe(self, sides: list[str]) -> str:
        parts = []
        for side, token, gap in zip(sides, self.tokens, self.gaps):
            known = "gap unknown" if gap is None else f"logit gap {gap:.4g}"
            parts.append(f"{side} {token!r} ({known})")
        return f"parts at token {self.index}: {', '.join(parts)}"


def find_parting(family, ours, theirs) -> Parting | None:
    """None for equal answers. `ours` has tokens, `theirs` may be a text alone."""
    if theirs.token_ids is None:
        return parting_from_text(family, ours, theirs.text)
    shorter = min(len(ours.token_ids), len(theirs.token_ids))
    pairs = zip(ours.token_ids, theirs.token_ids)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    ids = (token_at(ours, index), token_at(theirs, index))
    if ids == (None, None):
        return None
    texts = (text_of(family, ids[0]), text_of(family, ids[1]))
    gaps = (gap_of(ours, index, *ids), gap_of(theirs, index, *reversed(ids)))
    return Parting(index, texts, gaps)


def token_at(answer, index: int) -> int | None:
    """None behind the answer's end."""
    return answer.token_ids[index] if index < len(answer.token_ids) else None


def text_of(family, token: int | None) -> str:
    if token is None or token in family.stop_ids:
        return "end of the answer"
    return family.tokenizer.decode([token])


def gap_of(answer, index: int, own: int | None, other: int | None) -> float | None:
    """Difference of log probabilities, which is that of the logits."""
    if index >= len(answer.logprobs):
        return None
    known = answer.logprobs[index]
    if own not in known or other not in known:
        return None
    return known[own] - known[other]


def parting_from_text(family, ours, text: str) -> Parting | None:
    """Of the other side only the text is known: our gap is the one to our second choice."""
    if ours.text == text:
        return None
    shown = ""
    index = 0
    for index in range(len(ours.token_ids)):
        longer = family.tokenizer.decode(ours.token_ids[: index + 1]).rstrip("\ufffd")
        if not text.startswith(longer):
            break
        shown = longer
    rest = text[len(shown) :].lstrip()[:12] or "end of the answer"
    gap = None
    if index < len(ours.logprobs):
        first, second, *_ = sorted(ours.logprobs[index].values(), reverse=True)
        gap = first - second
    return Parting(index, (text_of(family, ours.token_ids[index]), rest), (gap, None))
