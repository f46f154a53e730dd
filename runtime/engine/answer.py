"""Text of an answer: takes its token ids, returns what the release shows, in pieces that never
change later."""

from models.prompt.streaming import StreamDecoder, partial_match


class AnswerText:
    """Decodes token by token, cleans as the family does, and cuts at the first stop string.

    `push` and `finish` return the new text; their concatenation is `text`. stopped: a stop string
    was met.
    """

    def __init__(self, family, stop: tuple[str, ...] = ()):
        self._family = family
        self._stop = stop
        self._decoder = StreamDecoder(family.tokenizer)
        self._raw = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._raw += self._decoder.push(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        self._raw += self._decoder.finish()
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [self._raw.find(stop) for stop in self._stop]
        cuts = [position for position in found if position >= 0]
        self.stopped = bool(cuts)
        raw = self._raw[: min(cuts)] if cuts else self._raw
        if not (final or self.stopped):
            raw = raw[: len(raw) - self._held_back(raw)]
        cleaned = self._family.clean(raw)
        new = cleaned[len(self.text) :]
        self.text = cleaned
        return new

    def _held_back(self, raw: str) -> int:
        """How many characters at the end may still change: the family's rule, or the beginning of a
        stop string."""
        begun = [partial_match(stop, raw) for stop in self._stop]
        return max([self._family.unstable_tail(raw), *begun])
