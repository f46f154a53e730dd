"""What the tokenizers have in common."""

from collections.abc import Iterable
from pathlib import Path

from models.prompt.tokenizer_limits import library_errors


class LibraryTokenizer:
    """A tokenizer of a library in C++ or Rust, whose failures become ModelErrors that name the file."""

    path: Path

    def encode(self, text: str) -> list[int]:
        with library_errors(self.path, "cut this text into tokens"):
            return self._encode(text)

    def encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        """Each SpecialToken is one id, all other pieces are plain text."""
        with library_errors(self.path, "cut this text into tokens"):
            return self._encode_pieces(pieces)

    def decode(self, ids) -> str:
        """Text of the ids; special ones and those beyond the vocabulary are left out."""
        with library_errors(self.path, "make a text of these tokens"):
            return self._decode([int(i) for i in ids])

    def part_bytes(self, token_id: int) -> bytes:
        """Bytes of a token that is only a part of a character."""
        with library_errors(self.path, "show a token"):
            return self._part_bytes(token_id)

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _part_bytes(self, token_id: int) -> bytes:
        raise NotImplementedError
