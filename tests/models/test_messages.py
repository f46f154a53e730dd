"""Messages that no chat has end in a sentence; texts become what UTF-8 can say."""

import paths
import pytest

from models import family_of
from models.errors import ModelError
from models.prompt.messages import check_messages, parse_content, plain_text

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "messages, words",
    [
        ("hi", "a list of dicts, not of type str"),
        (None, "a list of dicts"),
        ([5], "message 1 is of type int, not a dict"),
        ([USER, {"content": "x"}], "message 2 has no role"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": 5}], "content is a text or a list of parts, not of type int"),
        ([{"role": "user", "content": ["x"]}], "a content part is of type str"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'no text under the key "text"'),
        ([{"role": "user", "content": [{"type": "image"}]}], 'no image under the key "image"'),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "is not known"),
        ([{"role": "assistant", "content": "x", "metadata": 5}], "has metadata that is no text"),
        ([{"role": "assistant", "tool_calls": 5}], "message 1 has tool_calls that are not"),
        ([{"role": "assistant", "tool_calls": [{}]}], "message 1 has tool_calls that are not"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
            "message 1 has tool_calls that are not",
        ),
    ],
)
def test_malformed_messages(messages, words):
    with pytest.raises(ModelError) as error:
        check_messages(messages)
    assert words in str(error.value)


def test_messages_of_tools_need_no_content():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    check_messages([USER, {"role": "assistant", "content": None, "tool_calls": [call]}])


@pytest.mark.parametrize(
    "text, plain",
    [
        ("a😀", "a😀"),
        ("cut \ud83d", "cut \ufffd"),
        ("\ude00 x", "\ufffd x"),
        ("\ud83d\ude00", "😀"),
        ("caf\udce9", "caf\ufffd"),
    ],
)
def test_half_a_surrogate_pair(text, plain):
    assert plain_text(text) == plain
    assert parse_content(text)[0] == [{"type": "text", "text": plain}]


@pytest.mark.parametrize("name", ["glm4", "glm_edge", "llava", "visualglm", "glm4v"])
def test_every_family_takes_half_an_emoji(name):
    family = family_of(paths.GOLDEN / name)
    try:
        half = family.prompt([{"role": "user", "content": "cut \ud83d"}], family.languages[0])
        whole = family.prompt([{"role": "user", "content": "cut \ufffd"}], family.languages[0])
    except ModelError as error:  # the golden GLM-4 has no special tokens
        assert "have no" in str(error)
    else:
        assert half.ids.tolist() == whole.ids.tolist()
