"""Chat templates: where they are found, and rendered text equal to what transformers renders."""

import json
import shutil

import paths
import pytest

from models import family_of
from models.errors import ModelError
from models.prompt.chat_template import ChatTemplate, directory_template
from models.prompt.messages import parse_messages, with_plain_text
from models.prompt.templates.client import TemplateProcess
from runtime import Engine

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


STRINGS = [
    "{% for m in messages %}USER: {{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}",
    "{% for m in messages %}USER: {{ m['content'].strip() }}{% endfor %}",
    "{% for m in messages %}{% set text = m.content | trim %}USER: {{ text }}{% endfor %}",
    "{% for m in messages[0:] %}USER: {% if m.content[0] == 'x' %}?{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% with c = m.content %}USER: {{ c }}{% endwith %}{% endfor %}",
    "{% set n = namespace(c='') %}{% for m in messages %}{% set n.c = m.content %}USER: {{ n.c }}"
    "{% endfor %}",
    "{% macro say(c) %}USER: {{ c }}{% endmacro %}{% for m in messages %}{{ say(m.content) }}{% endfor %}",
    "{% for m in messages %}{% set a, b = m.role, 1 %}USER: {{ m.content[:99] }}{% endfor %}",
    "{% for m in messages %}USER: {% for w in m.content.split('!') %}{{ w }}{% endfor %}{% endfor %}",
]
LOOP = "{{ part.text if part.type == 'text' else '<image>\n' }}{% endfor %}{% endfor %}"
PARTS = [
    "{% for m in messages %}USER: {% for part in m.content %}" + LOOP,
    "{% for m in messages %}USER: {% for part in m['content'] | list %}" + LOOP,
    "{% for m in messages %}USER: {% set c = m.get('content') or [] %}{% for part in c %}" + LOOP,
    "{% for m in messages %}USER: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}" + LOOP.replace("{% endfor %}", "{% endfor %}{% endif %}", 1),
    "{% for m in messages %}USER: {{ '<image>\n' * (m.content | selectattr('type', 'equalto', 'image') "
    "| list | length) }}{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') "
    "| join }}{% endfor %}",
    "{% for m in messages %}{% with c = m.content %}USER: {% for part in c %}"
    + LOOP.replace("{% endfor %}", "{% endfor %}{% endwith %}", 1),
    "{% macro say(c) %}USER: {% for part in c %}"
    + LOOP.replace("{% endfor %}{% endfor %}", "{% endfor %}{% endmacro %}")
    + "{% for m in messages %}{{ say(m.content) }}{% endfor %}",
    "{% macro say(c) %}{% set d = c %}USER: {% for part in d %}"
    + LOOP.replace("{% endfor %}{% endfor %}", "{% endfor %}{% endmacro %}")
    + "{% for m in messages %}{{ say(c=m['content']) }}{% endfor %}",
    "{% set n = namespace(c='') %}{% for m in messages %}{% set n.c = m.content %}USER: "
    "{% for part in n.c %}" + LOOP,
    "{% for m in messages %}USER: {% for i in range(m.content | length) %}{{ m.content[i].text if "
    "m.content[i]['type'] == 'text' else '<image>\n' }}{% endfor %}{% endfor %}",
    "{% for m in messages %}USER: {{ '<image>\n' * (m.content | length - 1) }}"
    "{{ (m.content | last).text }}{% endfor %}",
    "{% for m in messages %}USER: {{ '<image>\n' * (m.content | length - 1) }}"
    "{{ m.content | join('', attribute='text') }}{% endfor %}",
    "{% for m in messages %}USER: {{ '<image>\n' * (m.content | length - 1) }}"
    "{{ m.content[-1]['text'] }}{% endfor %}",
]
FORMS = [(source, False) for source in STRINGS] + [(source, True) for source in PARTS]


@pytest.mark.parametrize("source, parts", FORMS)
def test_the_form_of_content_is_read_off_the_template(tmp_path, source, parts):
    template = ChatTemplate(source)
    assert template.takes_parts == parts
    folder = tmp_path / "llava"
    ignored = shutil.ignore_patterns("chat_template*", "*.npz", "*.safetensors")
    shutil.copytree(paths.GOLDEN / "llava", folder, ignore=ignored)
    (folder / "chat_template.jinja").write_text(source)
    family = family_of(folder)
    assert family.prompt([{"role": "user", "content": "Hello"}]).text == "USER: Hello"
    picture = {"type": "image", "image": str(paths.GOLDEN / "llava" / "image_a.png")}
    content = [picture, {"type": "text", "text": "Hello"}]
    prompt = family.prompt([{"role": "user", "content": content}])
    assert prompt.text == "USER: <image>\nHello"
    assert len(prompt.layout.image_starts) == 1


def test_an_image_in_a_template_of_strings_is_as_many_marks_as_it_has_rows(tmp_path):
    folder = tmp_path / "glm_edge_v"
    ignored = shutil.ignore_patterns("chat_template*", "*.npz", "*.safetensors")
    shutil.copytree(paths.GOLDEN / "glm_edge_v", folder, ignore=ignored)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}<|assistant|>"
    )
    family = family_of(folder)
    picture = {"type": "image", "image": str(paths.GOLDEN / "glm_edge_v" / "image_a.png")}
    prompt = family.prompt([{"role": "user", "content": [{"type": "text", "text": "?"}, picture]}])
    marks = "<|begin_of_image|>" * family.vision.rows
    assert prompt.text == f"<|user|>\n{marks}?<|assistant|>"


@pytest.mark.parametrize(
    "source", ["{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"]
)
def test_glm4_gives_its_template_the_form_that_it_reads(tmp_path, source):
    folder = tmp_path / "glm4"
    shutil.copytree(
        paths.GOLDEN / "glm4", folder, ignore=shutil.ignore_patterns("*.npz", "*.safetensors", "hf")
    )
    (folder / "chat_template.jinja").write_text(
        "[gMASK]<sop>{% for m in messages %}<|user|>\n" + source + "{% endfor %}<|assistant|>"
    )
    prompt = family_of(folder).prompt([{"role": "user", "content": "a <|user|>"}])
    assert prompt.text == "[gMASK]<sop><|user|>\na <|user|><|assistant|>"


def test_the_process_starts_beside_the_loading_of_a_model():
    process = TemplateProcess()
    process.start()
    first = process._process.pid
    process.start()
    assert process.ask("{{ a }}", {"a": "b"}, "t") == "b" and process._process.pid == first
    process._process.kill()
    process._process.wait()
    assert process.ask("{{ a }}", {"a": "c"}, "t") == "c" and process._process.pid != first
    process._process.kill()


@pytest.mark.parametrize(
    "name, started", [("glm_edge", 1), ("llava", 1), ("glm4", 0), ("visualglm", 0)]
)
def test_a_model_whose_prompts_are_templates_starts_it(name, started, monkeypatch):
    starts = []
    monkeypatch.setattr(TemplateProcess, "start", lambda self: starts.append(self))
    Engine(paths.GOLDEN / name, max_model_len=64)
    assert len(starts) == started


def test_glm4_with_a_template_of_its_own_starts_it(tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(TemplateProcess, "start", lambda self: starts.append(self))
    folder = tmp_path / "model"
    shutil.copytree(paths.GOLDEN / "glm4", folder, ignore=shutil.ignore_patterns("hf"))
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    family_of(folder).prepare_prompts()
    assert len(starts) == 1
