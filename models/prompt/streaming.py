"""Text of a growing answer: only what no later token can change."""


def partial_match(mark: str, text: str) -> int:
    """Length of the longest beginning of `mark`, short of all of it, that `text` ends with."""
    return max(n for n in range(len(mark)) if text.endswith(mark[:n]))


class StreamDecoder:
    """Token by token -> text pieces whose concatenation equals decode(all ids).

    A piece is given out only when it ends on a whole character; the window of ids that is decoded again stays short.
    After one of the tokenizer's `byte_ids` nothing is given out: it decodes a run of them as a whole, and one wrong
    byte at the end makes the whole run unreadable.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids = []
        self._start = 0
        self._given = 0
        self._byte_ids = getattr(tokenizer, "byte_ids", ())
        self._open_run = False

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        if self._byte_ids and (token_id in self._byte_ids or self._tokenizer.decode([token_id])):
            self._open_run = token_id in self._byte_ids  # an invisible token does not end a run
        return self._next(final=False)

    def finish(self) -> str:
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        now = self._tokenizer.decode(self._ids[self._start :])
        if not final and (self._open_run or now.endswith("\ufffd")):
            return ""
        piece = now[len(before) :]
        if piece:  # a window that starts on an invisible id would lose the blank after it
            self._start, self._given = self._given, len(self._ids)
        return piece
