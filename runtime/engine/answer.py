"""Text of an answer: takes its token ids, returns what the release shows, in pieces that never
change later."""

from models.prompt.streaming import StreamDecoder, partial_match

FOLLOWING = "x"  # stands for the text that follows; no family's `clean` changes a letter


class AnswerText:
    """Decodes token by token, cleans as the family does, and cuts at the first stop string of the
    cleaned text: what is not shown stops nothing.

    continued: the last token ids of a text that the answer continues; it is then shown as it is.
    `push` and `finish` return the new text; their concatenation is `text`. stopped: a stop string
    was met.
    """

    def __init__(self, family, stop: tuple[str, ...] = (), continued: list[int] | None = None):
        self._family = family
        self._stop = stop
        self._is_chat = continued is None
        self._decoder = StreamDecoder(family.tokenizer, continued or ())
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
        shown = self._certain(final)
        found = [shown.find(stop) for stop in self._stop]
        cuts = [position for position in found if position >= 0]
        self.stopped = bool(cuts)
        if cuts:
            shown = shown[: min(cuts)]
        elif not final:
            shown = shown[: len(shown) - self._held_back(shown)]
        shown = self._clean(shown)
        new = shown[len(self.text) :]
        self.text = shown
        return new

    def _certain(self, final: bool) -> str:
        """The text as it will be shown when more follows: with the blanks at its end."""
        raw = self._raw
        if self._is_chat and not final:
            raw = raw[: len(raw) - self._family.unstable_tail(raw)]
        return self._clean(raw + FOLLOWING)[: -len(FOLLOWING)]

    def _clean(self, text: str) -> str:
        return self._family.clean(text) if self._is_chat else text

    def _held_back(self, shown: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max((partial_match(stop, shown) for stop in self._stop), default=0)
