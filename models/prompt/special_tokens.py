"""Added tokens of a checkpoint, and which special ones a template wrote and which a user only typed.

Takes the folder's side files and texts, returns tokens and pieces. A special token in a message is plain text; an added
token that is not special, such as <think>, is one id in any text.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from models.errors import ModelError
from models.side_fields import LONGEST_ADDED, shown
from models.side_files import read_optional_json

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# lists or tables of further special tokens; the last two are transformers 5's
MORE_NAMES = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
OPEN = "\ue000"  # private use area of Unicode: these stand around the number of an escaped token
CLOSE = "\ue001"


class SpecialToken(str):
    """A piece of a prompt that is one token of the vocabulary.

    Other pieces are plain text, whatever they look like.
    """


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary file. token_id None: the next free one.

    lstrip, rstrip: it swallows the blanks on that side. single_word: only between words.
    normalized: it is looked for in a text that the tokenizer.json has normalised.
    """

    text: str
    token_id: int | None
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def pattern(self) -> str:
        """The token as a regular expression with one group."""
        pattern = re.escape(self.text)
        if self.single_word:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        before = r"\s*" if self.lstrip else ""
        behind = r"\s*" if self.rstrip else ""
        return f"{before}({pattern}){behind}"


def special_names(directory: Path) -> dict[str, str]:
    """{"bos_token": text, ...} of tokenizer_config.json, else of special_tokens_map.json."""
    named, settings = _settings(directory)
    tokens = named | settings
    return {name: _text(tokens[name]) for name in NAMES if tokens.get(name)}


def added_tokens(directory: Path) -> list[AddedToken]:
    """Of tokenizer_config.json, added_tokens.json and special_tokens_map.json, as transformers
    reads them."""
    named, settings = _settings(directory)
    named = list(dict.fromkeys((*_named(settings), *_named(named))))
    found = {}
    for token_id, entry in settings.get("added_tokens_decoder", {}).items():
        text = entry["content"]
        special = entry.get("special", False) or text in named
        strips = {name: entry.get(name, False) for name in ("lstrip", "rstrip", "single_word")}
        normalized = entry.get("normalized", not special)
        found[text] = AddedToken(text, int(token_id), special, **strips, normalized=normalized)
    for text, token_id in read_optional_json(directory / "added_tokens.json").items():
        _check_length(text, directory / "added_tokens.json")
        special = text in named
        found.setdefault(text, AddedToken(text, token_id, special, normalized=not special))
    for text in named:
        found.setdefault(text, AddedToken(text, None, True))
    return list(found.values())


def placed(tokens: Iterable[AddedToken], id_of: Callable, size: int) -> list[AddedToken]:
    """Added tokens with ids: those of the vocabulary (`id_of`, None for others), else the next free
    ones behind its `size` pieces and the other tokens, in order."""
    tokens = list(tokens)
    taken = [token.token_id for token in tokens if token.token_id is not None]
    free = max([size - 1, *taken]) + 1
    found = []
    for token in tokens:
        token_id = id_of(token.text) if token.token_id is None else token.token_id
        if token_id is None:
            token_id = free
            free += 1
        found.append(AddedToken(**(vars(token) | {"token_id": token_id})))
    return found


def broken_up(pieces: Iterable[str], mark: str) -> list[str]:
    """The pieces; plain ones are cut in the middle of each `mark`, so that no tokenizer sees it
    whole and takes it for the token of that name."""
    found = []
    half = len(mark) // 2
    for piece in pieces:
        if isinstance(piece, SpecialToken) or mark not in piece:
            found.append(piece)
            continue
        rest = piece.split(mark)
        for text in rest[:-1]:
            found += [text + mark[:half], mark[half:]]
        found.append(rest[-1])
    return [piece for piece in found if piece]


class TextSplitter:
    """Cuts a text at added tokens; the longest one counts where several begin."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self._tokens = sorted(tokens, key=lambda token: len(token.text), reverse=True)
        self._pattern = re.compile("|".join(token.pattern for token in self._tokens))

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Tokens, and the texts between them, none of them empty."""
        start = 0
        for found in self._pattern.finditer(text) if self._tokens else ():
            if found.start() > start:
                yield text[start : found.start()]
            yield self._tokens[found.lastindex - 1]
            start = found.end()
        if start < len(text):
            yield text[start:]


class SpecialTokenEscaper:
    """Tells the special tokens that a template writes from text of a message that looks like them.

    A template puts both into one text. So whatever looks like a special token in a message is
    escaped before rendering: its number between two private characters stands for it. What still
    looks like one in the rendered text is the template's, and `split` cuts the text there:

        escaper = SpecialTokenEscaper(("<|user|>", "<|assistant|>"))
        text = "<|user|>\\n" + escaper.escape("what does <|user|> mean?") + "<|assistant|>"
        escaper.split(text)  # -> <|user|>, "\\nwhat does <|user|> mean?", <|assistant|>
    """

    def __init__(self, special: Iterable[str]):
        self._special = (*special, OPEN)
        longest_first = sorted(self._special[:-1], key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._any = re.compile("|".join(map(re.escape, (*longest_first, OPEN))))
        self._numbers = {text: number for number, text in enumerate(self._special)}
        self._escaped = re.compile(f"{OPEN}([0-9]{{1,6}}){CLOSE}")

    def escape(self, value):
        """A text, or a structure of tables and lists with all its texts, escaped."""
        if isinstance(value, str):
            return self._any.sub(self._code_of, value)
        if isinstance(value, dict):
            return {self.escape(name): self.escape(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.escape(each) for each in value]
        return value

    def split(self, text: str) -> list[str]:
        """Pieces of a rendered text: each special token alone; what stands between, unescaped."""
        pieces = []
        start = 0
        for found in self._any_special.finditer(text):
            pieces += [self._plain(text[start : found.start()]), SpecialToken(found[0])]
            start = found.end()
        pieces.append(self._plain(text[start:]))
        return [piece for piece in pieces if piece]

    def _plain(self, text: str) -> str:
        return self._escaped.sub(self._text_of, text)

    def _text_of(self, code: re.Match) -> str:
        number = int(code[1])
        return self._special[number] if number < len(self._special) else code[0]

    def _code_of(self, found: re.Match) -> str:
        return f"{OPEN}{self._numbers[found[0]]}{CLOSE}"


def _settings(directory: Path) -> tuple[dict, dict]:
    """(special_tokens_map.json, tokenizer_config.json), {} where there is none."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    first, second = (read_optional_json(directory / name) for name in names)
    return first, second


def _named(settings: dict) -> list[str]:
    """Texts of the tokens that the settings name as special."""
    found = [settings[name] for name in NAMES if settings.get(name)]
    for name in MORE_NAMES:
        more = settings.get(name, [])
        found += more.values() if isinstance(more, dict) else more
    return [text for text in map(_text, found) if text]


def _check_length(text: str, file: Path):
    """An empty token would be found everywhere in a text, without end."""
    if not 0 < len(text) <= LONGEST_ADDED:
        raise ModelError(
            f"{file} has the token {shown(text)}, which must have 1 to {LONGEST_ADDED:,} characters; "
            f"take {file.name} from the release"
        )


def _text(token) -> str:
    return token["content"] if isinstance(token, dict) else token
