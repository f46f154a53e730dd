"""Bytes of single tokens: takes a token id, returns the UTF-8 bytes that it adds to an answer.

Tokenizers decode a part of a character to U+FFFD, and drop the blank in front of a first word; the
log probabilities of tokens need both.
"""

import re

REPLACEMENT = "\ufffd"
FALLBACK = re.compile("<0x([0-9A-F]{2})>")
# The bytes that byte-level vocabularies write as themselves; the others are written as the
# characters from U+0100 on, in order (Radford et al. 2019, GPT-2).
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def byte_level_characters() -> dict[str, int]:
    """Character of a byte-level vocabulary -> the byte that it stands for."""
    found = {chr(byte): byte for byte in PRINTABLE}
    others = (byte for byte in range(256) if byte not in PRINTABLE)
    for number, byte in enumerate(others):
        found[chr(0x100 + number)] = byte
    return found


BYTE_LEVEL = byte_level_characters()


def fallback_byte(piece: str) -> bytes:
    """The byte of a piece like <0xE4>; nothing for other pieces."""
    found = FALLBACK.fullmatch(piece)
    return bytes.fromhex(found[1]) if found else b""


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece of a byte-level vocabulary."""
    return bytes(BYTE_LEVEL[character] for character in piece if character in BYTE_LEVEL)


class TokenBytes:
    """of(id) -> the bytes that a token adds to a text that has already begun; with `at_start`, to
    an empty one. Special tokens add none.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")[-1:]
        self._text_before = tokenizer.decode(self._before)

    def of(self, token_id: int, at_start: bool = False) -> bytes:
        if at_start:
            text = self._tokenizer.decode([token_id])
        else:
            text = self._tokenizer.decode([*self._before, token_id])[len(self._text_before) :]
        if REPLACEMENT in text:
            return self._tokenizer.part_bytes(token_id) or text.encode()
        return text.encode()
