"""Streaming: pieces never split a character, never have to be taken back, and make up the whole
answer."""

from types import SimpleNamespace

import paths
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models import family_of
from models.prompt.streaming import StreamDecoder
from runtime.engine.answer import AnswerText

FAMILY = family_of(paths.GOLDEN / "visualglm")
TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from("描述这张图片，。 \n\tabc,!?;:[]训练时间0"), st.characters(codec="utf-8")
    ),
    max_size=40,
)


@given(TEXT)
def test_stream_decoder_equals_decoding_everything(text):
    ids = FAMILY.tokenizer.encode(text)
    decoder = StreamDecoder(FAMILY.tokenizer)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == FAMILY.tokenizer.decode(ids)


@given(st.lists(st.integers(0, 479), max_size=40))
@example([0, 5, 5])  # a piece that is a blank, twice: decoded alone, both are nothing
def test_stream_decoder_on_any_ids(ids):
    decoder = StreamDecoder(FAMILY.tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + decoder.finish() == FAMILY.tokenizer.decode(ids)


@given(TEXT)
def test_answer_pieces_make_the_cleaned_answer(text):
    ids = FAMILY.tokenizer.encode(text)
    answer = AnswerText(FAMILY)
    pieces = [answer.push(i) for i in ids] + [answer.finish()]
    assert "".join(pieces) == answer.text == FAMILY.clean(FAMILY.tokenizer.decode(ids))


@pytest.mark.parametrize(
    "stop, expected", [(("stop",), "go on "), (("on", "go"), ""), (("x",), "go on stop it")]
)
def test_stop_strings_cut_and_are_never_shown(stop, expected):
    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    plain = SimpleNamespace(tokenizer=letters, clean=str, unstable_tail=lambda text: 0)
    answer = AnswerText(plain, stop)
    shown = ""
    for letter in "go on stop it":
        shown += answer.push(ord(letter))
        if answer.stopped:
            break
    shown += answer.finish()
    assert shown == answer.text == expected
    assert answer.stopped == (expected != "go on stop it")


@pytest.mark.parametrize("family", ["visualglm", "glm4", "glm4_0414", "glm_edge", "glm4v"])
@pytest.mark.parametrize(
    "raw, stop, shown",
    [
        ("\nfirst line\nsecond line", "\n", "first line"),
        ("\n\nfirst\n\nsecond", "\n\n", "first"),
        (" one two three", " ", "one"),
        ("\n \n a\tb", "\t", "a"),
        ("\nonly one line", "\n", "only one line"),
        ("\nab cd\n", "d", "ab c"),
    ],
)
def test_a_stop_string_is_looked_for_in_what_is_shown(family, raw, stop, shown):
    family = family_of(paths.GOLDEN / family)
    answer = AnswerText(family, (stop,))
    pieces = []
    for token in family.tokenizer.encode(raw):
        pieces.append(answer.push(token))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    assert "".join(pieces) == answer.text == shown


@given(TEXT, TEXT)
@example("0\n", "0\n")
@example("\n0", "\n0")
def test_pieces_of_a_stopped_answer_make_the_shown_text_before_the_stop(text, stop):
    raw = FAMILY.tokenizer.decode(FAMILY.tokenizer.encode(text))
    whole = FAMILY.clean(raw + "x")[:-1]  # with the blanks at its end: they may be in a stop string
    answer = AnswerText(FAMILY, (stop,) if stop else ())
    pieces = [answer.push(i) for i in FAMILY.tokenizer.encode(text)] + [answer.finish()]
    expected = whole
    if stop and stop in whole:
        expected = whole[: whole.index(stop)]
    assert "".join(pieces) == answer.text == FAMILY.clean(expected)
