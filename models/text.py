"""Tokenizers read straight from the vocabulary files, and streaming decode that never splits a character."""
import re
from pathlib import Path

from .base import ModelError


class IceText:
    """ChatGLM-6B's sentencepiece file `ice_text.model`, without the remote tokenizer class.

    Line breaks, tabs and runs of blanks have pieces of their own. `offset` is added to every piece id (20000 image tokens
    of the first ChatGLM-6B files, 0 in the release); it follows from where the config says that <sop> is.
    """
    LONGEST_BLANK = 80

    def __init__(self, path: Path, sop_id: int):
        import sentencepiece
        if not path.is_file():
            raise ModelError(f"tokenizer file {path} is missing (released size about 2.7 MB); copy it from the release")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ModelError(f"{path} is not a sentencepiece file; download it again") from None
        self.offset = sop_id - self._pieces.piece_to_id("<sop>")

    def piece_id(self, piece: str) -> int:
        return self._pieces.piece_to_id(piece) + self.offset

    def encode(self, text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return [i + self.offset for i in self._pieces.encode(text)]

    def decode(self, ids) -> str:
        known = range(self._pieces.get_piece_size())
        text = self._pieces.decode([int(i) - self.offset for i in ids if int(i) - self.offset in known])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda mark: " " * int(mark[1]), text)


class StreamDecoder:
    """Token by token -> text pieces whose concatenation equals decode(all ids).

    A piece is given out only when it ends on a whole character; the window of ids that is decoded again stays short.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self._ids, self._start, self._given = tokenizer, [], 0, 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._next(final=False)

    def finish(self) -> str:
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start:self._given])
        now = self._tokenizer.decode(self._ids[self._start:])
        if now.endswith("\ufffd") and not final:
            return ""
        piece = now[len(before):]
        if piece:                       # a window that starts on an invisible id would lose the blank after it
            self._start, self._given = self._given, len(self._ids)
        return piece
