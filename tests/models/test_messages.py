"""Messages that no chat has end in a sentence; texts become what UTF-8 can say."""

import numpy as np
import paths
import pytest

from models import family_of
from models.errors import ModelError
from models.prompt.messages import check_messages, parse_content, plain_text

USER = {"role": "user", "content": "hi"}


MALFORMED = [
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
]
FAMILIES = ["glm4", "glm_edge", "glm_edge_v", "llava", "visualglm", "glm4v"]


@pytest.mark.parametrize("messages, words", MALFORMED)
def test_malformed_messages(messages, words):
    with pytest.raises(ModelError) as error:
        check_messages(messages)
    assert words in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_is_malformed(name):
    family = family_of(paths.GOLDEN / name)
    for messages, words in MALFORMED:
        with pytest.raises(ModelError) as error:
            family.prompt(messages, family.languages[0])
        assert words in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "wizard", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ],
        [{"role": "user", "content": [{"type": "image", "image": 5}]}],
        [{"role": "user", "content": [{"type": "image", "image": ""}]}],
        [{"role": "user", "content": [{"type": "image", "image": b""}]}],
        [{"role": "user", "content": [{"type": "image", "image": {}}]}],
    ],
)
def test_messages_that_no_family_answers(name, messages):
    family = family_of(paths.GOLDEN / name)
    with pytest.raises(ModelError):
        family.prompt(messages, family.languages[0])


@pytest.mark.parametrize("tools", [5, [5], [{}], [{"type": "function"}], [{"type": "function", "function": {"name": 5}}]])  # fmt: skip
def test_tools_that_are_none(tools):
    family = family_of(paths.GOLDEN / "glm4")
    with pytest.raises(ModelError, match="tools? "):
        family.prompt([USER], tools=tools)
    with pytest.raises(ModelError, match="tools? "):
        family.prompt([{**USER, "tools": tools}])


def test_visualglm_has_no_other_language():
    with pytest.raises(ModelError, match="no wording for language 'fr'; use zh or en"):
        family_of(paths.GOLDEN / "visualglm").prompt([USER], "fr")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "ids", [None, "abc", [1.5], [[1, 2], [3]], {}, ["1"], [None], [10**30], [True]]
)
def test_ids_that_are_no_numbers(name, ids):
    family = family_of(paths.GOLDEN / name)
    with pytest.raises(ModelError, match="ids are whole numbers, not "):
        family.prompt_from_ids(ids)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("glm4", "glm_edge")])
def test_pixels_and_starts_that_are_none(name):
    family = family_of(paths.GOLDEN / name)
    side = family.vision.input_shape[1]
    pixels = np.ones((1, 3, side, side), np.float32)
    for wrong in (
        "x",
        [[1], [2, 3]],
        5,
        [None],
        np.ones((3, 5, 5)),
        np.ones((1, 3, side, side), int),
    ):
        with pytest.raises(ModelError, match="pixels are|picture"):
            family.prompt_from_ids([1, 2, 3], wrong)
    for wrong in (["a"], [1.5], [10**9], [-1]):
        with pytest.raises(ModelError):
            family.prompt_from_ids([1, 2, 3], pixels, wrong)


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
