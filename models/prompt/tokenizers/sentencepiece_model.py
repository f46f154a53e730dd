"""The tokenizer of LLaVA in folders without a tokenizer.json."""

from collections.abc import Iterable
from pathlib import Path

from models.errors import ModelError
from models.prompt.special_tokens import (
    AddedToken,
    SpecialToken,
    SpecialTokenEscaper,
    TextSplitter,
    added_tokens,
    placed,
)
from models.prompt.token_bytes import fallback_byte
from models.prompt.tokenizer_limits import LARGEST, library_errors, try_first
from models.side_fields import MOST_ADDED
from models.side_files import read_bytes

from .library import LibraryTokenizer


class SentencePieceTokenizer(LibraryTokenizer):
    """LLaMA's `tokenizer.model`, for directories without a tokenizer.json: the same ids.

    The control pieces (<s>, </s>, <unk>) and the tokens that the folder's other files add are
    recognised in a text first. Only the beginning of a text gets sentencepiece's blank in front,
    with "legacy" every text behind a token. special: tokens that are special whatever the files say.
    """

    def __init__(
        self,
        path: Path,
        bos: str | None = "<s>",
        legacy: bool = False,
        special: dict[str, int] | None = None,
    ):
        special = special or {}
        try_first(type(self).__name__, path, bos, legacy, special)
        self.path = path
        with library_errors(path):
            self._pieces = _without_prefix(path)
            tokens = self._control_pieces()
        self._legacy = legacy
        controls = {token.text for token in tokens}
        found = [token for token in added_tokens(path.parent) if token.text not in controls]
        listed = {token.text for token in found}
        found += [AddedToken(text, i, True) for text, i in special.items() if text not in listed]
        tokens += placed(found, self._known_id, len(self._pieces))
        self._ids = {token.text: token.token_id for token in tokens}
        visible = [t for t in tokens if not t.special and t.text not in special]
        self._visible = {token.token_id: token.text for token in visible}
        self._shown = set(range(len(self._pieces))) - set(self._ids.values())
        self._special = tuple(text for text, i in self._ids.items() if i not in self._visible)
        self._splitter = TextSplitter(visible)
        self._escaper = SpecialTokenEscaper(self._special)
        self._prefix = [] if bos is None else [self.token_id(bos)]
        if self._prefix == [None]:
            raise ModelError(f"{path} has no token {bos}, which begins a prompt; download it again")

    def _control_pieces(self) -> list[AddedToken]:
        pieces = self._pieces
        special = [i for i in range(len(pieces)) if pieces.is_control(i) or pieces.is_unknown(i)]
        if len(special) > MOST_ADDED:
            raise ModelError(
                f"{self.path} has {len(special):,} control pieces, {MOST_ADDED:,} are the most; "
                "download it again"
            )
        return [AddedToken(pieces.id_to_piece(i), i, True) for i in special]

    def _known_id(self, token: str) -> int | None:
        piece = self._pieces.piece_to_id(token)
        return None if self._pieces.is_unknown(piece) else piece

    def special_tokens(self) -> tuple[str, ...]:
        return self._special

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token, self._known_id(token))

    def _encode(self, text: str) -> list[int]:
        return self._encode_pieces(self._escaper.split(text))

    def _encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        ids = []
        for piece in pieces:
            if isinstance(piece, SpecialToken):
                ids.append(self._ids[piece])
                continue
            for part in self._splitter.split(piece):
                is_token = isinstance(part, AddedToken)
                ids += [part.token_id] if is_token else self._text_ids(part, first=not ids)
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _text_ids(self, text: str, first: bool) -> list[int]:
        blank = self._legacy or (first and not text.startswith(" "))
        return self._pieces.encode(" " + text if blank else text)

    def _decode(self, ids: list[int]) -> str:
        text = ""
        run = []
        for token_id in ids:
            if token_id in self._visible:
                text += self._pieces.decode(run) + self._visible[token_id]
                run = []
            elif token_id in self._shown:
                run.append(token_id)
        return (text + self._pieces.decode(run)).removeprefix(" ")

    def _part_bytes(self, token_id: int) -> bytes:
        if token_id not in range(len(self._pieces)):
            return b""
        return fallback_byte(self._pieces.id_to_piece(token_id))


def _without_prefix(path: Path):
    """Its processor without the blank in front of a text, which is added where it belongs."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(read_bytes(path, LARGEST))
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
