"""Chat templates: where they are found, and rendered text equal to what transformers renders."""

import json

import pytest

from models.errors import ModelError
from models.prompt.chat_template import ChatTemplate, directory_template
from models.prompt.messages import parse_messages, with_plain_text

MESSAGES = [
    {"role": "user", "content": "a <b> & 'c'"},
    {"role": "assistant", "content": "好"},
    {"role": "user", "content": "d"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<天气>"}}]
RENDERED = {  # template -> text, given MESSAGES
    "{% if true %}\nx\n  {% endif %}\ny\n": "x\ny",
    "    {% for m in messages %}\n{{ m.role }}\n    {% endfor %}": "user\nassistant\nuser\n",
    "{%- for m in messages -%} {{ m['content'] }} {%- endfor -%}": "a <b> & 'c'好d",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": "a <b> & \'c\'"}',
    "{{ messages[1] | tojson(indent=2) }}": '{\n  "role": "assistant",\n  "content": "好"\n}',
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }};{% endfor %}": "a <b> & 'c';d;",
    "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}": "user",
    "{% generation %}\n{{ messages[1].content }}{% endgeneration %}!": "好!",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "3",
    "{{ bos_token }}{{ messages | length }}{{ eos_token }}{{ pad_token }}": "<s>3</s>",
    "{% if tools is none and documents is none and add_generation_prompt %}yes{% endif %}": "yes",
    "{{ strftime_now('%%') }}": "%",
}


@pytest.mark.parametrize("source, text", RENDERED.items())
def test_rendered_text(source, text):
    assert ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES) == text


@pytest.mark.parametrize("source", RENDERED)
def test_transformers_renders_the_same(source):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=True, **tokens
    )
    assert ChatTemplate(source, tokens).render(MESSAGES) == theirs[0]


def test_tools_are_given_to_the_template_or_refused():
    assert (
        ChatTemplate("{{ tools[0].function | tojson }}").render(MESSAGES, TOOLS)
        == '{"name": "weather", "description": "<天气>"}'
    )
    with pytest.raises(ModelError, match="no place for tools"):
        ChatTemplate("{{ messages }}").render(MESSAGES, TOOLS)


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "too big"),
        ("{{ messages + 'text' }}", "can only concatenate"),
    ],
)
def test_a_template_that_fails_is_one_sentence(source, complaint):
    with pytest.raises(ModelError, match=f"cannot render.*{complaint}"):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_with_a_syntax_error():
    with pytest.raises(ModelError, match="not valid Jinja.*line 2"):
        ChatTemplate("\n{% if %}")


def test_sources_in_order(tmp_path):
    assert directory_template(tmp_path) is None
    settings = {"bos_token": {"content": "<s>"}, "chat_template": "config{{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert directory_template(tmp_path).render(MESSAGES) == "config<s>"
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": "json{{ bos_token }}"})
    )
    assert directory_template(tmp_path).render(MESSAGES) == "json<s>"
    (tmp_path / "chat_template.jinja").write_text("jinja{{ bos_token }}\n")
    assert directory_template(tmp_path).render(MESSAGES) == "jinja<s>"


def test_named_templates(tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert directory_template(tmp_path).render(MESSAGES) == "plain"
    assert directory_template(tmp_path, tools=True).render(MESSAGES, TOOLS) == "with tools"


def test_messages_become_parts_in_order():
    content = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": "1.png"},
        {"type": "text", "text": "b"},
    ]
    turns, pictures = parse_messages(
        [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    )
    assert pictures == ["1.png"] and with_plain_text(turns)[1]["content"] == "ab"
    assert turns[0]["content"] == [{"type": "text", "text": "s"}]
    assert [part["type"] for part in turns[1]["content"]] == ["text", "image", "text"]


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "does not end with a user message"),
        ([{"role": "assistant", "content": "x"}], "does not end with a user message"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is not known"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part of type 'video' is not known"),
    ],
)
def test_messages_no_chat_has(messages, complaint):
    with pytest.raises(ModelError, match=complaint):
        parse_messages(messages)
