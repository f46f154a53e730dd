"""The tokenizer of ChatGLM-6B and VisualGLM-6B."""

import re
from pathlib import Path

from models.errors import ModelError
from models.prompt.special_tokens import AddedToken, TextSplitter, added_tokens, placed
from models.prompt.token_bytes import fallback_byte
from models.prompt.tokenizer_limits import LARGEST, library_errors, try_first
from models.side_files import read_bytes

from .library import LibraryTokenizer


class IceTokenizer(LibraryTokenizer):
    """ChatGLM-6B's sentencepiece file `ice_text.model`, without the remote tokenizer class.

    Line breaks, tabs and runs of blanks have pieces of their own. `offset` is added to every piece
    id (20000 for the image tokens of the first ChatGLM-6B files, 0 in the release); it follows from
    the config's id of <sop>.
    """

    def __init__(self, path: Path, sop_id: int):
        import sentencepiece

        if not path.is_file():
            raise ModelError(
                f"tokenizer file {path} is missing (released size about 2.7 MB); "
                "copy it from the release"
            )
        try_first(type(self).__name__, path, sop_id)
        self.path = path
        content = read_bytes(path, LARGEST)
        with library_errors(path):
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.offset = sop_id - self._pieces.piece_to_id("<sop>")
        tokens = placed(added_tokens(path.parent), self._known_id, len(self._pieces) + self.offset)
        visible = [token for token in tokens if not token.special]
        self._added = {token.text: token.token_id for token in tokens}
        self._splitter = TextSplitter(visible)
        self._visible = {token.token_id: token.text for token in visible}

    def piece_id(self, piece: str) -> int:
        return self._pieces.piece_to_id(piece) + self.offset

    def token_id(self, piece: str) -> int | None:
        """Id of an added token or a piece; None for other texts."""
        return self._added.get(piece, self._known_id(piece))

    def _known_id(self, piece: str) -> int | None:
        number = self._pieces.piece_to_id(piece)
        return None if self._pieces.is_unknown(number) else number + self.offset

    def _encode(self, text: str) -> list[int]:
        """Added tokens that are not special are one id; what stands between is text of its own."""
        ids = []
        for part in self._splitter.split(text):
            ids += [part.token_id] if isinstance(part, AddedToken) else self._text_ids(part)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return [i + self.offset for i in self._pieces.encode(text)]

    def _decode(self, ids: list[int]) -> str:
        known = range(self._pieces.get_piece_size())
        text = ""
        run = []
        for token_id in ids:
            if token_id in self._visible:
                text += self._run_text(run) + self._visible[token_id]
                run = []
            elif token_id - self.offset in known:
                run.append(token_id - self.offset)
        return text + self._run_text(run)

    def _run_text(self, pieces: list[int]) -> str:
        text = self._pieces.decode(pieces).replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda mark: " " * int(mark[1]), text)

    def _part_bytes(self, token_id: int) -> bytes:
        if token_id - self.offset not in range(self._pieces.get_piece_size()):
            return b""
        return fallback_byte(self._pieces.id_to_piece(token_id - self.offset))
