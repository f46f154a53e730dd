"""Tokenizers. Each takes a vocabulary file, encodes text to ids and decodes ids to text.

No code of the checkpoint runs, and no tokenizer class of transformers is needed. part_bytes(id) are
the bytes of a token that is only a part of a character, which `decode` cannot show.
"""

import base64
import re
from pathlib import Path

from models.errors import ModelError
from models.side_fields import LARGEST_ID, MOST_ADDED, is_added_token, is_whole, shown
from models.side_files import parse_json, read_bytes, read_optional_json, read_text

from .token_bytes import byte_level_bytes, fallback_byte
from .tokenizer_limits import LARGEST, check_tokenizer, library_errors, try_first


class LibraryTokenizer:
    """What the tokenizers have in common: a library in C++ or Rust, whose failures become
    ModelErrors that name the file."""

    path: Path

    def encode(self, text: str) -> list[int]:
        with library_errors(self.path, "cut this text into tokens"):
            return self._encode(text)

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

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _part_bytes(self, token_id: int) -> bytes:
        raise NotImplementedError


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

    def piece_id(self, piece: str) -> int:
        return self._pieces.piece_to_id(piece) + self.offset

    def _encode(self, text: str) -> list[int]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return [i + self.offset for i in self._pieces.encode(text)]

    def _decode(self, ids: list[int]) -> str:
        known = range(self._pieces.get_piece_size())
        pieces = [token_id - self.offset for token_id in ids]
        text = self._pieces.decode([piece for piece in pieces if piece in known])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda mark: " " * int(mark[1]), text)

    def _part_bytes(self, token_id: int) -> bytes:
        return fallback_byte(self._pieces.id_to_piece(token_id - self.offset))


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
        settings = path.with_name("tokenizer_config.json")
        self._added = added_tokens(settings)
        self._added = self._added or {piece: len(ranks) + i for i, piece in enumerate(special)}
        self._visible = visible_tokens(settings)
        self._pieces |= {token_id: piece.encode() for piece, token_id in self._visible.items()}
        with library_errors(path):
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=self._visible
            )

    def special_tokens(self) -> tuple[str, ...]:
        return tuple(piece for piece in self._added if piece not in self._visible)

    def token_id(self, piece: str) -> int | None:
        """Id of an added piece."""
        return self._added.get(piece)

    def _encode(self, text: str) -> list[int]:
        """Plain text: what looks like a special piece is spelled out."""
        return self._encoding.encode(
            text, allowed_special=set(self._visible), disallowed_special=()
        )

    def _decode(self, ids: list[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self._pieces.get(token_id, b"") for token_id in ids)
        return text.decode("utf-8", errors="replace")

    def _part_bytes(self, token_id: int) -> bytes:
        return self._pieces.get(token_id, b"")


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

    def decode(self, ids) -> str:
        return ""


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


def added_tokens(path: Path) -> dict[str, int]:
    """Special tokens of a tokenizer_config.json -> their ids; empty without file or list."""
    added = read_optional_json(path).get("added_tokens_decoder", {})
    return {entry["content"]: int(token_id) for token_id, entry in added.items()}


def token_ids(path: Path) -> dict[str, int]:
    """{token: id} of an added_tokens.json; empty without the file."""
    listed = read_optional_json(path)
    for token, token_id in listed.items():
        if not is_added_token({"content": token}) or not is_whole(token_id, 0, LARGEST_ID):
            raise ModelError(
                f"{path} gives {shown(token)} the id {shown(token_id)}, which must be a whole number "
                f"from 0 to {LARGEST_ID:,}; take {path.name} from the release"
            )
    return dict(listed)


def visible_tokens(path: Path) -> dict[str, int]:
    """Those of `added_tokens` that are not special: one id in a text, and shown in answers."""
    added = read_optional_json(path).get("added_tokens_decoder", {})
    entries = added.items()
    return {entry["content"]: int(i) for i, entry in entries if entry.get("special") is False}


class JsonTokenizer(LibraryTokenizer):
    """A `tokenizer.json` of the tokenizers library.

    bos_id: goes in front of every text, once; None: no such token. plain: what looks like a special
    token in a text is spelled out.
    """

    def __init__(self, path: Path, bos_id: int | None = None, plain: bool = False):
        from tokenizers import Tokenizer

        text = read_text(path, LARGEST)
        content = parse_json(text, path)
        if not isinstance(content, dict):
            raise ModelError(f"{path} is not a tokenizer file; download it again")
        check_tokenizer(content, path)
        try_first(type(self).__name__, path, bos_id, plain)
        self.path = path
        with library_errors(path):
            self._tokenizer = Tokenizer.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = plain
        self._bos = [] if bos_id is None else [bos_id]
        pieces = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(piece for piece in pieces if piece is not None)

    def special_tokens(self) -> tuple[str, ...]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids if ids[:1] == self._bos else self._bos + ids

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _part_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id) or ""
        return fallback_byte(piece) or byte_level_bytes(piece)


class SentencePieceTokenizer(LibraryTokenizer):
    """LLaMA's `tokenizer.model`, for directories without a tokenizer.json: the same ids.

    added: {token: id} of the tokens that are not in the sentencepiece file; they and its control
    pieces (<s>, </s>, <unk>) are recognised in a text first. hidden: those of `added` that answers
    do not show. Only the beginning of a text gets
    sentencepiece's blank in front.
    """

    def __init__(self, path: Path, added: dict[str, int], bos_id: int, hidden=None):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        try_first(type(self).__name__, path, added, bos_id)
        self.path = path
        with library_errors(path):
            model = sentencepiece_model_pb2.ModelProto.FromString(read_bytes(path, LARGEST))
            model.normalizer_spec.add_dummy_prefix = False  # `encode` adds it, where it belongs
            self._pieces = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
            self._special = self._control_pieces()
        self._special |= added
        self._shown = set(range(len(self._pieces))) - set(self._special.values())
        hidden = added if hidden is None else hidden
        self._visible = {i: token for token, i in added.items() if token not in hidden}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bos = bos_id

    def _control_pieces(self) -> dict[str, int]:
        pieces = self._pieces
        special = [i for i in range(len(pieces)) if pieces.is_control(i) or pieces.is_unknown(i)]
        if len(special) > MOST_ADDED:
            raise ModelError(
                f"{self.path} has {len(special):,} control pieces, {MOST_ADDED:,} are the most; "
                "download it again"
            )
        return {pieces.id_to_piece(i): i for i in special}

    def token_id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        piece = self._pieces.piece_to_id(token)
        return None if self._pieces.is_unknown(piece) else piece

    def _encode(self, text: str) -> list[int]:
        ids = []
        for part in filter(None, self._split.split(text)):
            if part in self._special:
                ids.append(self._special[part])
            elif ids or part.startswith(" "):
                ids += self._pieces.encode(part)
            else:
                ids += self._pieces.encode(" " + part)
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]

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
        return fallback_byte(self._pieces.id_to_piece(token_id))
