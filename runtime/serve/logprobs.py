"""Log probabilities of an answer's tokens, as OpenAI's two APIs have them.

Takes rows of Result.logprobs, returns the dicts of a response.
"""

import codecs

from models.prompt.token_bytes import TokenBytes


class TokenLogprobs:
    """Of one answer, whose tokens are passed in their order. count: how many of the likeliest
    tokens of each place the client asked for. continued: the answer continues a text."""

    def __init__(self, tokenizer, count: int, continued: bool = False):
        self._bytes = TokenBytes(tokenizer)
        self._count = count
        self._at_start = not continued
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of all tokens so far

    def chat(self, token_ids: list[int], rows: list[dict[int, float]]) -> dict:
        """rows: per token {id: log probability}, of the likeliest tokens and of itself."""
        entries = []
        for chosen, row in zip(token_ids, rows):
            likeliest = by_probability(row)[: self._count]
            top = [self._entry(other, row) for other in likeliest]
            entries.append({**self._entry(chosen, row), "top_logprobs": top})
            self._pass(chosen)
        return {"content": entries}

    def completion(self, token_ids: list[int], rows: list[dict[int, float]]) -> dict:
        """As `chat`; the row of a first token, which nothing precedes, may be None. Every token of
        a row has a key of its own. text_offset: the character of the text at which a token begins."""
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chosen, row in zip(token_ids, rows):
            names = self._names(chosen, row or {})
            top = {names[other]: row[other] for other in by_probability(row)} if row else None
            found["tokens"].append(names[chosen])
            found["token_logprobs"].append(row[chosen] if row else None)
            found["top_logprobs"].append(top)
            found["text_offset"].append(self._offset_of(chosen))
            self._pass(chosen)
        return found

    def _names(self, chosen: int, row: dict[int, float]) -> dict[int, str]:
        """The texts of a row's tokens; where two are equal, vLLM's `token_id:N` for the one that
        was not chosen or is less likely."""
        names = {chosen: self._text(chosen)}
        for other in by_probability(row):
            if other in names:
                continue
            text = self._text(other)
            names[other] = f"token_id:{other}" if text in names.values() else text
        return names

    def _entry(self, token_id: int, row: dict[int, float]) -> dict:
        return {
            "token": self._text(token_id),
            "logprob": row[token_id],
            "bytes": list(self._bytes.of(token_id, self._at_start)),
        }

    def _text(self, token_id: int) -> str:
        """A part of a character is written as OpenAI does: bytes:\\xf0\\x9f."""
        content = self._bytes.of(token_id, self._at_start)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + content.decode(errors="backslashreplace")

    def _offset_of(self, token_id: int) -> int:
        """Where the next token begins. What is left of a character that it does not continue is
        shown as one mark in front of it."""
        content = self._bytes.of(token_id, self._at_start)
        continues = content and content[0] & 0xC0 == 0x80
        if content and not continues:
            self._offset += len(self._decoder.decode(b"", final=True))
        return self._offset

    def _pass(self, token_id: int):
        """Special tokens do not begin the text."""
        content = self._bytes.of(token_id, self._at_start)
        self._offset += len(self._decoder.decode(content))
        if self._bytes.of(token_id):
            self._at_start = False


def by_probability(row: dict[int, float]) -> list[int]:
    """The token ids of a row of Result.logprobs, the most likely first."""
    return sorted(row, key=row.get, reverse=True)
