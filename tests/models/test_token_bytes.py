"""Bytes of single tokens: together they are the UTF-8 of the text, in every kind of tokenizer."""

import paths
import pytest

from models import family_of
from models.prompt.token_bytes import TokenBytes

FAMILIES = ("visualglm", "glm4", "glm4v", "glm_edge", "glm_edge_v", "llava")
TEXTS = ("你好 world  two 😀ñ\n x", "𠀀é 🤖", "plain words here", "  two blanks first", "\ufffd")


def joined(tokenizer, ids) -> bytes:
    token_bytes = TokenBytes(tokenizer)
    found = b""
    begun = False
    for token_id in ids:
        found += token_bytes.of(token_id, at_start=not begun)
        begun = begun or bool(token_bytes.of(token_id))
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_are_the_text(name, text):
    tokenizer = family_of(paths.GOLDEN / name).tokenizer
    ids = tokenizer.encode(text)
    assert joined(tokenizer, ids) == tokenizer.decode(ids).encode()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_of_a_character_has_its_own_byte(name):
    tokenizer = family_of(paths.GOLDEN / name).tokenizer
    token_bytes = TokenBytes(tokenizer)
    parts = [i for i in tokenizer.encode("a😀") if "\ufffd" in tokenizer.decode([i])]
    assert parts
    assert b"".join(token_bytes.of(i) for i in parts).endswith("😀".encode()[1:])


@pytest.mark.parametrize("name", ["glm_edge", "glm4", "llava"])
def test_a_blank_before_a_word_is_kept_inside_a_text_only(name):
    tokenizer = family_of(paths.GOLDEN / name).tokenizer
    word = tokenizer.encode("a b")[-1]
    token_bytes = TokenBytes(tokenizer)
    assert token_bytes.of(word) in (b" b", b"b")
    assert token_bytes.of(word, at_start=True) == tokenizer.decode([word]).encode()


def test_special_tokens_add_nothing():
    family = family_of(paths.GOLDEN / "llava")
    assert [TokenBytes(family.tokenizer).of(i) for i in (0, 1, 2)] == [b"", b"", b""]
