"""The tokenizer of GLM-4 and GLM-4V in the layout of their releases."""

import base64
from pathlib import Path

from models.errors import ModelError
from models.prompt.special_tokens import AddedToken, TextSplitter, added_tokens, placed
from models.prompt.tokenizer_limits import LARGEST, library_errors, try_first
from models.side_files import read_bytes

from .library import LibraryTokenizer


class TiktokenTokenizer(LibraryTokenizer):
    """GLM-4's `tokenizer.model`: a line "base64-bytes rank" per token; byte-pair encoding by rank.

    Added tokens have ids of their own behind the ranks: those of tokenizer_config.json, else those
    of `special` in order. Those that are not special are one id in any text, and are shown.
    """

    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path: Path, special: tuple[str, ...] = ()):
        import tiktoken

        try_first(type(self).__name__, path, special)
        self.path = path
        ranks = _read_ranks(path)
        self._pieces = {rank: piece for piece, rank in ranks.items()}
        found = added_tokens(path.parent)
        if not any(token.token_id is not None for token in found):
            known = [token.text for token in found]
            found = [AddedToken(text, None, True) for text in special if text not in known] + found
        tokens = placed(found, lambda text: ranks.get(text.encode()), len(ranks))
        visible = [token for token in tokens if not token.special]
        self._added = {token.text: token.token_id for token in tokens}
        self._special = tuple(token.text for token in tokens if token.special)
        self._splitter = TextSplitter(visible)
        self._pieces |= {token.token_id: token.text.encode() for token in visible}
        for token in self._special:
            self._pieces.pop(self._added[token], None)
        with library_errors(path):
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={}
            )

    def special_tokens(self) -> tuple[str, ...]:
        return self._special

    def token_id(self, piece: str) -> int | None:
        """Id of an added piece."""
        return self._added.get(piece)

    def _encode(self, text: str) -> list[int]:
        """Plain text: what looks like a special piece is spelled out."""
        ids = []
        for part in self._splitter.split(text):
            known = isinstance(part, AddedToken)
            ids += [part.token_id] if known else self._encoding.encode_ordinary(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self._pieces.get(token_id, b"") for token_id in ids)
        return text.decode("utf-8", errors="replace")

    def _part_bytes(self, token_id: int) -> bytes:
        return self._pieces.get(token_id, b"")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """{bytes: rank}. The library needs every byte and ranks without gaps."""
    try:
        lines = [line.split() for line in read_bytes(path, LARGEST).splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
    except ValueError:
        raise ModelError(
            f'{path} is not a tokenizer file of lines "base64 rank"; download it again'
        ) from None
    complete = all(bytes([byte]) in ranks for byte in range(256))
    if not complete or set(ranks.values()) != set(range(len(ranks))):
        raise ModelError(
            f"{path} lacks tokens: it must have all 256 bytes, and ranks from 0 up without gaps; "
            "download it again"
        )
    return ranks
