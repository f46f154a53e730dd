"""The tokenizer in a tokenizer.json, and what stands in for a file that is missing."""

from collections.abc import Iterable
from pathlib import Path

from models.errors import ModelError
from models.prompt.special_tokens import (
    AddedToken,
    SpecialToken,
    SpecialTokenEscaper,
    added_tokens,
)
from models.prompt.token_bytes import byte_level_bytes, fallback_byte
from models.prompt.tokenizer_limits import LARGEST, check_tokenizer, library_errors, try_first
from models.side_files import parse_json, read_text

from .library import LibraryTokenizer

# A mark for a special token in a text: of a character that no text contains (a noncharacter of
# Unicode; where one does, it becomes U+FFFD) and a number.
MARK = "\ufdd0"
MARK_END = "\ufdd1"


class JsonTokenizer(LibraryTokenizer):
    """A `tokenizer.json` of the tokenizers library, with what the folder's other files add.

    prefixed: the ids that the file's post-processor puts in front of a text (<s>) go in front, once.
    plain: what looks like a special token in the text of `encode` is spelled out. special: tokens
    that are special whatever the files say.
    """

    def __init__(
        self,
        path: Path,
        prefixed: bool = False,
        plain: bool = False,
        special: tuple[str, ...] = (),
    ):
        from tokenizers import Tokenizer

        text = read_text(path, LARGEST)
        content = parse_json(text, path)
        if not isinstance(content, dict):
            raise ModelError(f"{path} is not a tokenizer file; download it again")
        check_tokenizer(content, path)
        try_first(type(self).__name__, path, prefixed, plain, special)
        self.path = path
        self._plain = plain
        with library_errors(path):
            self._tokenizer = Tokenizer.from_str(text)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._prefix = self._tokenizer.encode("").ids if prefixed else []
            self._add_tokens(special)
            self._mark_special()
        pieces = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(piece for piece in pieces if piece is not None)

    def _add_tokens(self, special: tuple[str, ...]):
        """The tokens that the folder's other files name, as transformers adds them."""
        known = {token.content: token for token in self._added().values()}
        for token in sorted(added_tokens(self.path.parent), key=_placed_first):
            there = known.get(token.text)
            if there is None or (token.special and not there.special):
                self._add(token)
        self._tokenizer.add_special_tokens([text for text in special if self.token_id(text)])

    def _add(self, token: AddedToken):
        import tokenizers

        new = tokenizers.AddedToken(
            token.text,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
        add = self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens
        add([new])
        given = self.token_id(token.text)
        if token.token_id not in (None, given):
            raise ModelError(
                f"{self.path.parent} gives the token {token.text!r} the id {token.token_id} in "
                f"tokenizer_config.json or added_tokens.json, and {given} by tokenizer.json; take "
                "all three from one save of the tokenizer"
            )

    def _mark_special(self):
        """From now on special tokens are plain text, and the marks stand for them."""
        import tokenizers

        special = [token for token in self._added().values() if token.special]
        self._special = tuple(token.content for token in special)
        self._escaper = SpecialTokenEscaper(self._special)
        self._marks = {}
        marks = []
        for number, token in enumerate(special):
            self._marks[token.content] = f"{MARK}{number}{MARK_END}"
            mark = tokenizers.AddedToken(
                self._marks[token.content],
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
            )
            marks.append(mark)
        self._tokenizer.add_tokens(marks)
        self._tokenizer.encode_special_tokens = True
        self._marked = {
            self._tokenizer.token_to_id(mark): self._tokenizer.token_to_id(text)
            for text, mark in self._marks.items()
        }

    def _added(self) -> dict:
        return self._tokenizer.get_added_tokens_decoder()

    def special_tokens(self) -> tuple[str, ...]:
        return self._special

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _encode(self, text: str) -> list[int]:
        return self._encode_pieces([text] if self._plain else self._escaper.split(text))

    def _encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        ids = []
        for text in self._texts(pieces):
            ids += self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._marked.get(token_id, token_id) for token_id in ids]
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _texts(self, pieces: Iterable[str]) -> list[str]:
        """What is encoded at once: between two plain pieces lies a cut that was made on purpose."""
        texts = [""]
        after_plain = False
        for piece in pieces:
            is_special = isinstance(piece, SpecialToken) and piece in self._marks
            if after_plain and not is_special:
                texts.append("")
            texts[-1] += self._marks[piece] if is_special else piece.replace(MARK, "\ufffd")
            after_plain = not is_special
        return texts

    def _decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i not in self._marked]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _part_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None or token_id in self._marked:
            return b""
        return fallback_byte(piece) or byte_level_bytes(piece)


def _placed_first(token: AddedToken) -> tuple[bool, int]:
    return token.token_id is None, token.token_id or 0


class MissingTokenizer:
    """Where a checkpoint has no tokenizer file: prompts must be ids, answers have no text."""

    def __init__(self, path: Path):
        self._path = path

    def special_tokens(self) -> tuple[str, ...]:
        return ()

    def token_id(self, piece: str) -> None:
        return None

    def encode(self, text: str):
        raise ModelError(f"tokenizer file {self._path} is missing; copy it from the release")

    encode_pieces = encode

    def decode(self, ids) -> str:
        return ""
