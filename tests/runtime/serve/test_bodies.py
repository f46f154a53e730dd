"""What a body may be: every 400 names the wrong part; null is the default; limits come first."""

import json

import pytest

from runtime.serve.errors import ApiError
from runtime.serve.known_fields import LLAMA_CPP, NEUTRAL, OPENAI, SGLANG, VLLM
from runtime.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LegacyRequest,
    TokenizeRequest,
)
from runtime.serve.transport.bodies import MAX_NESTED, check_content_type, parse

HI = [{"role": "user", "content": "hi"}]


def refusal(body, model=ChatRequest) -> ApiError:
    """The error of a body, given as bytes or as fields beside `messages`."""
    if isinstance(body, dict):
        body = json.dumps({"messages": HI, **body}).encode()
    with pytest.raises(ApiError) as caught:
        parse(model, body).check()
    return caught.value


def of_part(part) -> ApiError:
    return refusal({"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "input_text", "text": "hi"}, ["'input_text'", "use type 'text'"]),
        ({"type": "image", "image": "x"}, ["'image'", "use type 'image_url'"]),
        ({"type": "input_image", "image_url": "x"}, ["'input_image'", "use type 'image_url'"]),
        ({"type": "file", "file": {}}, ["'file'"]),
        ({"type": "video_url", "video_url": {"url": "x"}}, ["'video_url'"]),
        ({"type": 7}, ["a number as its type"]),
        ({"text": "hi"}, ["no type"]),
        ({"type": None, "text": "hi"}, ["no type"]),
        ({"type": "text", "text": None}, ["no text"]),
        ({"type": "text"}, ["no text"]),
        ({"type": "text", "text": 5}, ["a number as its text"]),
        ({"type": "image_url"}, ["no image_url"]),
        ({"type": "image_url", "image_url": {"url": None}}, ["no image_url.url"]),
        ({"type": "image_url", "image_url": {}}, ["no image_url.url"]),
        ({"type": "image_url", "image_url": [1]}, ["a list as its image_url"]),
        ("plain", ["is a text"]),
        (None, ["is null"]),
        ([], ["is a list"]),
    ],
)
def test_the_wrong_part_is_named(part, words):
    error = of_part(part)
    assert error.status == 400 and error.param == "messages.0.content"
    assert str(error).startswith("messages.0.content: part 0 ")
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({"stop": ["a", None]}, "stop", "null at place 1"),
        ({"stop": 7}, "stop", "a number"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "a number"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
        ({"messages": [None]}, "messages.0", ""),
        ({"messages": None}, "messages", ""),
        ({"tool_choice": 5}, "tool_choice", ""),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", ""),
        ({"stop_token_ids": ["x"]}, "stop_token_ids.0", ""),
        ({"logprobs": "yes please"}, "logprobs", ""),
    ],
)
def test_the_wrong_field_is_named_without_names_of_types(body, field, word):
    error = refusal(body)
    assert error.param == field and word in str(error)
    for name in ("constrained-str", "list[", "literal[", "ToolChoice", "union", ".str"):
        assert name not in str(error) and name not in error.param


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        (["a", "b"], "several prompts"),
        ([[1], [2]], "several prompts"),
        ([1, "a"], "a text at place 1"),
        ([[1.5]], "a number at place 0"),
        ([True], "true or false"),
        (7, "is a number"),
        (None, ""),
    ],
)
def test_prompts_that_are_refused(prompt, word):
    error = refusal(json.dumps({"prompt": prompt}).encode(), CompletionRequest)
    assert error.param == "prompt" and word in str(error)


@pytest.mark.parametrize(
    ("prompt", "meant"), [([[10, 20]], [10, 20]), (["hi"], "hi"), ([3, 4], [3, 4]), ("x", "x")]
)
def test_one_prompt_in_a_list_is_that_prompt(prompt, meant):
    assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompt == meant


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"messages":[],}', "not JSON: "),
        (b"", "not JSON: "),
        (b"{'a': 1}", "line 1, column 2"),
        (b"\xff", "UTF-8"),
        (b"[" * 40_000, "nests too deeply"),
        (b"[1]", "no object"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_what_is_no_json_object_is_said(body, word):
    assert word in str(refusal(body))


def test_lists_are_counted_before_they_are_built():
    parts = b'{"type":"text","text":"[{,"},' * 60_000
    body = b'{"messages":[{"role":"user","content":[' + parts[:-1] + b"]}]}"
    assert f"limit is {MAX_NESTED:,}" in str(refusal(body))
    text = json.dumps({"messages": [{"role": "user", "content": "[{" * 60_000}]}).encode()
    assert parse(ChatRequest, text).messages[0].content == "[{" * 60_000
    unfinished = b'{"messages": "' + rb"\"" * 200_000
    assert "not JSON" in str(refusal(unfinished))


@pytest.mark.parametrize(
    ("body", "model", "field"),
    [
        ({"messages": HI * 4097}, ChatRequest, "messages"),
        ({"messages": HI * 4097}, TokenizeRequest, "messages"),
        ({"text": "x", "history": [["a", "b"]] * 2049}, LegacyRequest, "history"),
        ({"tokens": [1] * 1_000_001}, DetokenizeRequest, "tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
            ChatRequest,
            "messages.0.content",
        ),
    ],
)
def test_lists_have_limits(body, model, field):
    with pytest.raises(ApiError) as caught:
        parse(model, json.dumps(body).encode())
    assert caught.value.param == field


def test_null_is_the_default_of_every_field():
    for model, given in (
        (ChatRequest, {"messages": HI}),
        (CompletionRequest, {"prompt": "hi"}),
        (LegacyRequest, {"text": "hi"}),
        (TokenizeRequest, {"prompt": "hi"}),
    ):
        nulls = dict.fromkeys(set(model.model_fields) - set(given))
        plain = parse(model, json.dumps(given).encode())
        assert parse(model, json.dumps({**nulls, **given}).encode()) == plain
    nested = {"messages": HI, "stream_options": {"include_usage": None}}
    assert not parse(ChatRequest, json.dumps(nested).encode()).wants_usage
    assert parse(CompletionRequest, b'{"prompt": "x", "max_tokens": null}').max_tokens == 16


def test_a_developer_is_a_system():
    body = {"messages": [{"role": "developer", "content": "Be brief."}, *HI]}
    assert parse(ChatRequest, json.dumps(body).encode()).messages[0].role == "system"


OTHER_VALUES = ({"type": "object"}, ["x"], 7, 0.5, "x", True, False)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_known_constraints_are_refused_unless_neutral(name):
    for value in (*NEUTRAL[name], None):
        parse(ChatRequest, json.dumps({"messages": HI, name: value}).encode()).check()
    refused = [value for value in OTHER_VALUES if value not in NEUTRAL[name]]
    for value in refused:
        error = refusal({name: value})
        assert error.param == name and error.code == "unsupported_parameter"
    assert len(refused) >= len(OTHER_VALUES) - 1


def test_known_fields_are_none_that_the_schema_has():
    own = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    assert not own & set(NEUTRAL)
    assert all((OPENAI, VLLM, LLAMA_CPP, SGLANG))
    parse(ChatRequest, json.dumps({"messages": HI, "no_such_field": {"a": 1}}).encode()).check()


def test_prompt_logprobs_of_zero_are_refused():
    assert refusal({"prompt_logprobs": 0}).param == "prompt_logprobs"


def test_true_is_not_one():
    assert refusal({"n": True}).param == "n"


@pytest.mark.parametrize("given", [None, "", "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_named(given):
    with pytest.raises(ApiError, match="Content-Type"):
        check_content_type(given)


@pytest.mark.parametrize(
    "given", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_json_content_types(given):
    check_content_type(given)
