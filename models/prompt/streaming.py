"""Text of a growing answer. Takes ids or text so far, returns what no later token can change."""

TRAINING_DATE = "[[训练时间]]"  # what the GLM models write for the date of their training


def with_training_date(answer: str) -> str:
    """The answer without blanks around it, and with a date in place of the models' placeholder."""
    return answer.strip().replace(TRAINING_DATE, "2023年")


def partial_match(mark: str, text: str) -> int:
    """Length of the longest proper prefix of `mark` that `text` ends with."""
    return max(n for n in range(len(mark)) if text.endswith(mark[:n]))


class StreamDecoder:
    """Token by token -> text pieces whose concatenation equals decode(all ids).

    before: ids whose text the pieces continue; with them, decode(before + ids) without the text of
    `before`.

    A piece is returned only when it ends on a whole character; only a short window of ids is
    decoded again. After one of the tokenizer's `byte_ids` nothing is returned: it decodes a run of
    them as a whole, and one wrong byte at the end makes the whole run unreadable.
    """

    def __init__(self, tokenizer, before=()):
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._window_start = 0
        self._returned = len(self._ids)  # ids whose text has been returned
        self._byte_ids = getattr(tokenizer, "byte_ids", ())
        self._in_byte_run = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" if none did."""
        self._ids.append(token_id)
        if self._byte_ids and (token_id in self._byte_ids or self._tokenizer.decode([token_id])):
            self._in_byte_run = token_id in self._byte_ids  # an invisible token does not end a run
        return self._next(final=False)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._window_start : self._returned])
        now = self._tokenizer.decode(self._ids[self._window_start :])
        if not final and (self._in_byte_run or now.endswith("\ufffd")):
            return ""
        piece = now[len(before) :]
        if (
            piece.strip()
        ):  # a window that starts on an invisible id or a blank loses the blanks after it
            self._window_start = self._returned
        if piece:
            self._returned = len(self._ids)
        return piece
