"""Special tokens in a rendered prompt: which the template wrote, and which a user only typed."""

import re

ESCAPE = 0xE000  # first code point of Unicode's private use area, which no message should contain


class SpecialToken(str):
    """A piece of a prompt that is one token of the vocabulary.

    Other pieces are plain text, whatever they look like.
    """


class SpecialTokenEscaper:
    """Tells the special tokens that a template writes from text of a message that looks like them.

    A template puts both into one text. So whatever looks like a special token in a message is
    escaped before rendering: U+E000 and one character for its number stand for it. What still looks
    like one in the rendered text is the template's, and `split` cuts the text there:

        escaper = SpecialTokenEscaper(("<|user|>", "<|assistant|>"))
        text = "<|user|>\\n" + escaper.escape("what does <|user|> mean?") + "<|assistant|>"
        escaper.split(text)  # -> <|user|>, "\\nwhat does <|user|> mean?", <|assistant|>
    """

    def __init__(self, special: tuple[str, ...]):
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._any_special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        last = chr(ESCAPE + len(special) - 1)
        self._escaped = re.compile(f"{chr(ESCAPE)}([{chr(ESCAPE)}-{last}])")

    def escape(self, text: str) -> str:
        return self._any_special.sub(self._code_of, text)

    def split(self, text: str) -> list[str]:
        """Pieces of a rendered text: each special token alone; what stands between, unescaped."""
        pieces = []
        for piece in self._any_special.split(text):
            if piece in self._special:
                pieces.append(SpecialToken(piece))
            elif piece:
                pieces.append(self._escaped.sub(self._token_of, piece))
        return pieces

    def _code_of(self, found: re.Match) -> str:
        return chr(ESCAPE) + chr(ESCAPE + self._special.index(found[0]))

    def _token_of(self, code: re.Match) -> str:
        return self._special[ord(code[1]) - ESCAPE]
