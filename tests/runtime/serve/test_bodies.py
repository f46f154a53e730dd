"""What a body may be: every 400 names the wrong part; null is the default; limits come first."""

import json

import pytest

from runtime.serve.errors import ApiError
from runtime.serve.known_fields import (
    LLAMA_CPP,
    NEUTRAL,
    OF_CHATS,
    OF_COMPLETIONS,
    OPENAI,
    SGLANG,
    VLLM,
)
from runtime.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LegacyRequest,
    TokenizeRequest,
)
from runtime.serve.transport.bodies import (
    MAX_NESTED,
    check_content_type,
    check_encoding,
    parse,
)

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


PART = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("part", "place", "words"),
    [
        ({"type": "input_text", "text": "hi"}, PART, ["'input_text'", "use type 'text'"]),
        ({"type": "image", "image": "x"}, PART, ["'image'", "use type 'image_url'"]),
        ({"type": "input_image", "image_url": "x"}, PART, ["'input_image'", "'image_url'"]),
        ({"type": "file", "file": {}}, PART, ["'file'"]),
        ({"type": "video_url", "video_url": {"url": "x"}}, PART, ["'video_url'"]),
        ({"type": "input_audio", "input_audio": {}}, PART, ["'input_audio'"]),
        ({"type": "Text", "text": "hi"}, PART, ["'Text'"]),
        ({"type": 7}, PART + ".type", ["is a number"]),
        ({"text": "hi"}, PART, ["no type"]),
        ({"type": None, "text": "hi"}, PART, ["no type"]),
        ({"type": "text", "text": None}, PART + ".text", ["missing or null"]),
        ({"type": "text"}, PART + ".text", ["missing or null"]),
        ({"type": "text", "text": 5}, PART + ".text", ["is a number"]),
        ({"type": "text", "text": "\ud83d"}, PART + ".text", ["half of a surrogate pair"]),
        ({"type": "refusal", "refusal": 5}, PART + ".refusal", ["is a number"]),
        ({"type": "image_url"}, PART, ["no image_url"]),
        ({"type": "image_url", "image_url": {"url": None}}, PART + ".image_url.url", ["missing"]),
        ({"type": "image_url", "image_url": {}}, PART + ".image_url.url", ["missing"]),
        ({"type": "image_url", "image_url": {"url": 5}}, PART + ".image_url.url", ["is a number"]),
        ({"type": "image_url", "image_url": [1]}, PART + ".image_url", ["is a list"]),
        ("plain", PART, ["is a text"]),
        (None, PART, ["is null"]),
        ([], PART, ["is a list"]),
    ],
)
def test_the_wrong_part_is_named(part, place, words):
    error = of_part(part)
    assert error.status == 400 and error.param == place
    assert str(error).startswith(place + " ")
    for word in words:
        assert word in str(error)


def test_the_part_of_a_later_message_is_named():
    text = {"type": "text", "text": "hi"}
    wrong = {"type": "image_url", "image_url": {"url": None}}
    messages = [
        *HI,
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [text, wrong]},
    ]
    assert refusal({"messages": messages}).param == "messages[2].content[1].image_url.url"


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({"stop": ["a", None]}, "stop[1]", "is null"),
        ({"stop": [["a"]]}, "stop[0]", "is a list"),
        ({"stop": 7}, "stop", "is a number"),
        ({"stop": {}}, "stop", "is an object"),
        ({"stop": ""}, "stop", "empty text"),
        ({"stop": ["a", ""]}, "stop[1]", "empty text"),
        ({"stop": "x" * 257}, "stop", "257 characters; the limit is 256"),
        ({"stop": ["x"] * 17}, "stop", "17 texts; the limit is 16"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "is a number"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content", "is an object"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "has no content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        ({"messages": [*HI, {"role": "User", "content": "x"}]}, "messages[1].role", "'User'"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role", "is a number"),
        ({"messages": [None]}, "messages[0]", "is null; give an object"),
        ({"messages": ["hi"]}, "messages[0]", "is a text; give an object"),
        ({"messages": None}, "messages", "is null; give a list"),
        ({"messages": "hi"}, "messages", "is a text; give a list"),
        ({"messages": []}, "messages", "0 entries"),
        ({"tool_choice": 5}, "tool_choice", "is 5"),
        ({"tool_choice": "any"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", ""),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.function", "is missing"),
        ({"tools": {}}, "tools", "is an object; give a list"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools[0].function.strict",
            "is true",
        ),
        ({"stop_token_ids": ["x"]}, "stop_token_ids[0]", "is a text"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]", "is a text"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids[0]", "is a number"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]", "is true or false"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids[1]", "no token id"),
        ({"stop_token_ids": 5}, "stop_token_ids", "is a number; give a list"),
        ({"logprobs": "yes please"}, "logprobs", "give true or false"),
        ({"logprobs": 5}, "logprobs", "give true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "is 21; 20 or less"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"max_tokens": True}, "max_tokens", "is true or false; give a number"),
        ({"max_tokens": 0}, "max_tokens", "is 0; 1 or more"),
        ({"max_tokens": 4.5}, "max_tokens", "is 4.5; a whole number"),
        ({"max_tokens": "many"}, "max_tokens", "is a text; give a whole number"),
        ({"temperature": False}, "temperature", "is true or false; give a number"),
        ({"temperature": float("nan")}, "temperature", "a finite number"),
        ({"top_p": 0}, "top_p", "is 0; more than 0"),
        ({"stream": []}, "stream", "is a list; give true or false"),
        ({"stream_options": []}, "stream_options", "is a list; give an object"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"model": 5}, "model", "is a number; give a text"),
    ],
)
def test_the_wrong_field_is_named_without_names_of_types(body, field, word):
    error = refusal(body)
    assert error.param == field and word in str(error) and str(error).startswith(field + " ")
    for name in (
        "constrained-str",
        "list[",
        "literal[",
        "ToolChoice",
        "union",
        "stop.str",
        "Input",
        "tuple",
    ):
        assert name not in str(error) and name not in error.param


@pytest.mark.parametrize(
    ("prompt", "place", "word"),
    [
        (["a", "b"], "prompt", "several prompts"),
        ([[1], [2]], "prompt", "several prompts"),
        ([1, "a"], "prompt[1]", "is a text"),
        ([[1.5]], "prompt[0][0]", "is a number"),
        ([[3, -1]], "prompt[0][1]", "no token id"),
        ([True], "prompt[0]", "true or false"),
        (7, "prompt", "is a number"),
        (None, "prompt", "is null"),
    ],
)
def test_prompts_that_are_refused(prompt, place, word):
    error = refusal(json.dumps({"prompt": prompt}).encode(), CompletionRequest)
    assert error.param == place and word in str(error)


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
            "messages[0].content",
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
    assert not parse(ChatRequest, json.dumps(nested).encode()).stream_options.include_usage
    assert parse(CompletionRequest, b'{"prompt": "x", "max_tokens": null}').max_tokens == 16


@pytest.mark.parametrize("role", ["assistant", "system", "developer", "tool"])
def test_who_says_nothing_may_have_null_as_content(role):
    body = {"messages": [*HI, {"role": role, "content": None}, *HI]}
    assert parse(ChatRequest, json.dumps(body).encode()).messages[1].says_nothing


def test_a_tool_without_a_type_is_a_function():
    function = {"function": {"name": "f", "description": None, "parameters": None}}
    body = {
        "messages": HI,
        "tools": [function, {"type": None, **function}],
        "tool_choice": function,
    }
    request = parse(ChatRequest, json.dumps(body).encode())
    assert request.tool_names == {"f"} and request.forced_tool == "f"


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "I will not"},
        {"content": [{"type": "refusal", "refusal": "I will not"}]},
    ],
)
def test_a_refusal_is_what_the_assistant_said(said):
    body = {"messages": [*HI, {"role": "assistant", **said}, *HI]}
    assert parse(ChatRequest, json.dumps(body).encode()).messages[1].texts == ["I will not"]


@pytest.mark.parametrize(("seed", "meant"), [(None, None), (-1, None), (7, 7), (-(2**63), 0)])
def test_seeds_of_all_64_bits(seed, meant):
    body = json.dumps({"messages": HI, "seed": seed}).encode()
    assert parse(ChatRequest, body).sampling().seed == meant


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


@pytest.mark.parametrize(
    ("model", "own", "foreign"),
    [
        (ChatRequest, {"messages": HI}, OF_COMPLETIONS),
        (CompletionRequest, {"prompt": "x"}, OF_CHATS),
    ],
)
def test_fields_of_the_other_endpoint_are_refused(model, own, foreign):
    for name, neutral in foreign.items():
        for value in (*neutral, None):
            parse(model, json.dumps({**own, name: value}).encode()).check()
        error = refusal(json.dumps({**own, name: [7]}).encode(), model)
        assert error.param == name and "at this endpoint" in str(error)


def test_null_inside_a_neutral_value_changes_nothing():
    given = {"response_format": {"type": "text", "json_schema": None}}
    parse(ChatRequest, json.dumps({"messages": HI, **given}).encode()).check()
    assert refusal({"response_format": {"type": "json_object"}}).param == "response_format"


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


def test_a_compressed_body_is_called_so():
    check_encoding(None)
    check_encoding("identity")
    with pytest.raises(ApiError, match="compressed .*gzip") as caught:
        check_encoding("gzip")
    assert caught.value.status == 415


@pytest.mark.parametrize(
    "given", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_json_content_types(given):
    check_content_type(given)
