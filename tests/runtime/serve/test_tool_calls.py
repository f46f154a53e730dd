"""GLM-4's functions through the service: what the model is told, and its calls, whole and as a stream.

The engine is scripted: its "model" says what the test wants, token by token; all else is the service's own.
"""

import json
import shutil

import openai
import paths
import pytest
import torch
from http_service import Server

from models import family_of
from runtime import Engine
from runtime.engine.image_features import ImageFeatures
from runtime.serve.tools.calls import ToolCallParser

GOLDEN = paths.GOLDEN / "glm4"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "查天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED = [{"role": "user", "content": "北京天气"}]
CALL = 'get_weather\n{"city": "北京 {x}"}'
SYSTEM = (
    "<|system|>\n你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
    "\n\n## get_weather\n\n{}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
)
# The release's template, but for its built-in tools.
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\nTools:"
    "{% set tools = item['tools'] %}"
    "{% for tool in tools %}{% if tool['type'] == 'function' %}\n\n## {{ tool['function']['name'] }}\n\n"
    "{{ tool['function'] | tojson(indent=4) }}{% endif %}{% endfor %}{% endif %}{% if item['content'] %}"
    "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Script:
    """In the scheduler's place: every request gets the tokens of `says`, then those of `end`."""

    def __init__(self, family):
        self.family = family
        self.says = ""
        self.end = "<|user|>"
        self.requests = []

    def add(self, request):
        self.requests.append(request)

    def step(self):
        request = self.requests[0]
        ids = [*self.family.tokenizer.encode(self.says), self.family.tokenizer.token_id(self.end)]
        logits = torch.zeros(self.family.decoder.vocab_size)
        logits[ids[len(request.sequence.token_ids)]] = 50
        piece = request.sample_next(logits)
        if request.finished:
            self.requests.remove(request)
        return [(request, piece)]

    def cancel(self, request):
        if request in self.requests:
            request.finish("cancelled")
            self.requests.remove(request)

    @property
    def busy(self):
        return bool(self.requests)


class Scripted(Engine):
    def __init__(self, directory):
        self.family = family_of(directory)
        self.max_model_len = 2048
        self._image_features = ImageFeatures(None)
        self._team = None
        self._scheduler = self.script = Script(self.family)
        self.prompts = []

    def add(self, prompt, params=None):
        self.prompts.append(prompt.text)
        return super().add(prompt, params)


def opened(directory):
    engine = Scripted(directory)
    server = Server(
        "--model", str(directory), "--served-model-name", "glm", open_engine=lambda: engine
    )
    server.script = engine.script
    return server


@pytest.fixture(scope="module")
def server():
    running = opened(GOLDEN)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def edge():
    running = opened(GOLDEN.parent / "glm_edge")
    yield running
    running.stop()


def ask(server, says, end="<|observation|>", messages=ASKED, **more):
    server.script.says = says
    server.script.end = end
    body = {"tools": [WEATHER, CLOCK], "temperature": 0, "max_tokens": 200, **more}
    return server.client().chat.completions.create(model="glm", messages=messages, **body)


def joined(chunks):
    """(content, name, arguments, finish_reason) of a stream; a call's id, name and type come once, and first."""
    content = ""
    name = None
    arguments = ""
    ids = []
    reasons = []
    for choice in (chunk.choices[0] for chunk in chunks):
        content += choice.delta.content or ""
        reasons += [choice.finish_reason] * (choice.finish_reason is not None)
        for call in choice.delta.tool_calls or ():
            assert call.index == 0 and (call.id is None) == (name is not None)
            ids += [call.id] * bool(call.id)
            name = name or call.function.name
            arguments += call.function.arguments
    assert len(ids) <= 1 and len(reasons) == 1
    return content, name, arguments, reasons[0]


def told(choice):
    """The same of a whole answer."""
    [call] = choice.message.tool_calls or [None]
    assert call is None or (call.type == "function" and call.id.startswith("call_"))
    return (
        choice.message.content or "",
        call and call.function.name,
        call.function.arguments if call else "",
        choice.finish_reason,
    )


@pytest.mark.parametrize(
    ("says", "end", "expected"),
    [
        (CALL, "<|observation|>", ("", "get_weather", '{"city": "北京 {x}"}', "tool_calls")),
        ("\nclock \n {}\n", "<|observation|>", ("", "clock", "{}", "tool_calls")),
        ("\n你好\n{}", "<|user|>", ("你好\n{}", None, "", "stop")),
        ("get_weath", "<|user|>", ("get_weath", None, "", "stop")),
        ("get_weather", "<|user|>", ("get_weather", None, "", "stop")),
        (
            "get_weather\nis a function",
            "<|user|>",
            ("get_weather\nis a function", None, "", "stop"),
        ),
        ("get_time\n{}", "<|user|>", ("get_time\n{}", None, "", "stop")),
        ('get_weather\n{"city": ', "<|user|>", ("", "get_weather", '{"city":', "tool_calls")),
        ("", "<|user|>", ("", None, "", "stop")),
    ],
)
def test_calls_and_what_only_looks_like_one(says, end, expected, server):
    assert told(ask(server, says, end).choices[0]) == expected
    assert joined(list(ask(server, says, end, stream=True))) == expected


def test_choice(server):
    plain = ask(server, CALL, tool_choice="none").choices[0]
    assert (
        plain.message.content == CALL
        and plain.message.tool_calls is None
        and "##" not in server.engine.prompts[-1]
    )
    named = {"type": "function", "function": {"name": "clock"}}
    for more in ({"tool_choice": named}, {"tool_choice": "required", "tools": [CLOCK]}):
        for stream in (False, True):
            got = ask(server, '{"zone": 1}', stream=stream, **more)
            assert (joined(list(got)) if stream else told(got.choices[0])) == (
                "",
                "clock",
                '{"zone": 1}',
                "tool_calls",
            )
            assert server.engine.prompts[-1].endswith("<|assistant|>clock\n")
    assert told(ask(server, "", tool_choice=named).choices[0]) == ("", "clock", "", "tool_calls")
    assert told(ask(server, CALL, max_tokens=20).choices[0])[::3] == ("", "length"), (
        "a call cut off is not whole"
    )


def test_logprobs_of_what_is_held_back_are_not_lost(server):
    whole = ask(server, CALL, logprobs=True).choices[0].logprobs.content
    rows = [
        row
        for chunk in ask(server, CALL, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for row in chunk.choices[0].logprobs.content
    ]
    assert [row.token for row in rows] == [row.token for row in whole] and len(rows) > 10


def test_what_the_model_is_told(server, tmp_path):
    """Golden texts: the first tokenizer code's wording, and the release's template, which loses a line break behind every
    block tag where transformers renders it."""
    first = ask(server, CALL).choices[0].message
    said = first.model_dump(
        exclude_none=True
    )  # openai cannot write its own objects once msmodelslim was imported
    described = json.dumps(WEATHER["function"], ensure_ascii=False, indent=4)
    system = "[gMASK]<sop>" + SYSTEM.replace("{}", described)
    told_clock = '\n\n## clock\n\n{\n    "name": "clock"\n}\n在调用上述函数时，请使用 Json 格式表示调用的参数。'
    assert server.engine.prompts[-1] == system + told_clock + "<|user|>\n北京天气<|assistant|>"
    more = [
        *ASKED,
        said,
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "20 度"},
    ]
    behind = '<|user|>\n北京天气<|assistant|>get_weather\n{"city": "北京 {x}"}<|observation|>\n20 度<|assistant|>'
    assert (
        ask(server, "\n20 度", "<|user|>", more, tools=[WEATHER]).choices[0].message.content
        == "20 度"
    )
    assert server.engine.prompts[-1] == system + behind
    for file in ("config.json", "tokenizer.model"):
        shutil.copy(GOLDEN / file, tmp_path)
    settings = json.loads((GOLDEN / "tokenizer_config.json").read_text()) | {
        "chat_template": TEMPLATE
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = [
        {"role": "user", "content": "北京天气"},
        first.model_dump(),
        {"role": "tool", "content": "20 度"},
    ]
    assert (
        family_of(tmp_path).prompt(turns, tools=[WEATHER]).text
        == "[gMASK]<sop><|system|>\nTools:\n## get_weather\n\n" + described + behind
    )


def test_two_calls_are_two_turns_and_text_stands_before_them():
    calls = [
        {"type": "function", "function": {"name": "clock", "arguments": arguments}}
        for arguments in ("", "{}")
    ]
    turns = [
        *ASKED,
        {"role": "assistant", "content": "嗯", "tool_calls": calls},
        {"role": "tool", "content": "9"},
        {"role": "tool", "content": "<|user|>"},
    ]
    prompt = family_of(GOLDEN).prompt(turns)
    assert prompt.text == (
        "[gMASK]<sop><|user|>\n北京天气<|assistant|>\n嗯<|assistant|>clock\n{}<|assistant|>clock\n{}"
        "<|observation|>\n9<|observation|>\n<|user|><|assistant|>"
    )
    assert prompt.ids.tolist().count(family_of(GOLDEN).tokenizer.token_id("<|user|>")) == 1, (
        "a result is text"
    )


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"tools": [{"type": "python"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "strict"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "other"}}},
            "'other', which is none of the tools",
        ),
        ({"tool_choice": "required"}, "exactly one tool"),
        ({"tool_choice": "required", "tools": []}, "exactly one tool"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "content": None}]}, "does not end with"),
        (
            {
                "messages": [
                    {"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
                ]
            },
            "assistant's message",
        ),
    ],
)
def test_mistakes(more, word, server):
    with pytest.raises(openai.BadRequestError, match=word):
        ask(server, CALL, **more)


def test_deep_parameters_are_refused(server):
    schema = {}
    for _ in range(100):
        schema = {"x": schema}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    got = server.post("/v1/chat/completions", {"messages": ASKED, "tools": tools})
    assert got.status_code == 400 and "nested deeper than 32" in got.json()["error"]["message"]


def test_a_family_without_tools_says_so(edge):
    for more in ({}, {"tools": [], "messages": [{"role": "tool", "content": "x"}, *ASKED]}):
        with pytest.raises(openai.BadRequestError, match="glm-edge, knows none"):
            ask(edge, "x", "<|user|>", **more)
    assert ask(edge, "x", "<|user|>", tool_choice="none").choices[0].message.content == "x"
    assert not family_of(GOLDEN.parent / "glm4v").takes_tools


def test_a_stream_is_cut_anywhere_the_same():
    family = family_of(GOLDEN)
    for text in (CALL, "get_weather x\n{", "你好"):
        for step in (1, 2, 5, 100):
            parser = ToolCallParser(family, {"get_weather", "get"})
            deltas = [
                d for i in range(0, len(text), step) for d in parser.push(text[i : i + step])
            ] + parser.finish()
            content = "".join(delta.get("content", "") for delta in deltas)
            arguments = "".join(
                call["function"]["arguments"]
                for delta in deltas
                for call in delta.get("tool_calls", ())
            )
            assert (content, arguments) == (
                ("", text.split("\n")[1]) if text == CALL else (text, "")
            )
