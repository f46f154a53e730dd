"""Tokens that a fine-tune added: one id in prompts, visible in answers unless they are special; special ones that a
user types are text."""

import json
import shutil

import paths
import pytest

from models import family_of
from models.errors import ModelError
from models.prompt import tokenizer_limits
from models.prompt.special_tokens import AddedToken, TextSplitter

ADDED = {"<think>": 305, "</think>": 306, "<|tool|>": 307}
MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>x</think>y"},
    {"role": "user", "content": "<|tool|>"},
]
TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "<|assistant|>\n<|tool|>"
)


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """Sound tokenizer files need no trial in a process of their own."""
    monkeypatch.setattr(tokenizer_limits, "is_trial", True)


def copied(tmp_path, name):
    folder = tmp_path / "checkpoint"
    ignored = shutil.ignore_patterns("*.npz", "*.safetensors", "hf")
    shutil.copytree(paths.GOLDEN / name, folder, ignore=ignored)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def tiktoken_family(tmp_path):
    folder = copied(tmp_path, "glm4")

    def change(settings):
        for token, token_id in ADDED.items():
            entry = {"content": token, "special": token == "<|tool|>"}
            settings["added_tokens_decoder"][str(token_id)] = entry
        settings["chat_template"] = TEMPLATE

    edit(folder / "tokenizer_config.json", change)
    return family_of(folder)


def test_glm4_added_tokens_are_one_id_and_typed_special_ones_are_text(tiktoken_family):
    ids = tiktoken_family.prompt(MESSAGES).ids.tolist()
    assert [token_id for token_id in ids if token_id >= 305] == [305, 306, 307]
    assert ids[-1] == 307
    assert tiktoken_family.prompt(MESSAGES).text.count("<|tool|>") == 2


def test_glm4_answers_show_what_is_not_special(tiktoken_family):
    tokenizer = tiktoken_family.tokenizer
    (letter,) = tokenizer.encode("a")
    assert tokenizer.decode([305, letter, 306, 307]) == "<think>a</think>"


def test_glm4_hf_special_tokens_of_the_template_are_those_of_transformers(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(
        paths.GOLDEN / "glm4" / "hf", folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(paths.GOLDEN / "glm_edge" / name, folder / name)
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hello"}]
    theirs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert family_of(folder).prompt(messages).ids.tolist() == theirs


def test_llava_tokenizer_model_shows_added_tokens_that_are_not_special(tmp_path):
    folder = copied(tmp_path, "llava")
    (folder / "tokenizer.json").unlink()
    edit(folder / "added_tokens.json", lambda added: added.update({"<box>": 482}))
    tokenizer = family_of(folder).tokenizer
    ids = tokenizer.encode("a <box>b")
    assert ids.count(482) == 1
    assert tokenizer.decode([*ids, 480, 481, 2]) == "a <box>b"


def entry(content, special=False, **strips):
    return {"content": content, "special": special} | strips


def with_settings(tmp_path, name, json_file=True, **settings):
    """A copy of a golden folder with more in its tokenizer_config.json."""
    folder = copied(tmp_path, name)
    if not json_file:
        (folder / "tokenizer.json").unlink()
    added = settings.pop("added", {})

    def change(content):
        content.update(settings)
        content.setdefault("added_tokens_decoder", {}).update(added)

    edit(folder / "tokenizer_config.json", change)
    return folder


# family, whether it has its tokenizer.json, the first free id
KINDS = [
    ("glm4", True, 305),
    ("glm4v", True, 305),
    ("glm_edge", True, 508),
    ("glm_edge_v", True, 508),
    ("llava", True, 482),
    ("llava", False, 482),
    ("visualglm", True, None),
]


def first_free(name, given):
    """The id behind those of a golden folder."""
    if given is not None:
        return given
    tokenizer = family_of(paths.GOLDEN / name).tokenizer
    return len(tokenizer._pieces) + getattr(tokenizer, "offset", 0)


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{'json' if kind[1] else 'model'}")
def kind(request):
    name, json_file, free = request.param
    return name, json_file, first_free(name, free)


def test_a_visible_token_is_one_id_in_a_text_and_is_shown(tmp_path, kind):
    name, json_file, free = kind
    added = {str(free): entry("<box>"), str(free + 1): entry("<|end|>", special=True)}
    folder = with_settings(tmp_path, name, json_file, added=added)
    tokenizer = family_of(folder).tokenizer
    ids = list(tokenizer.encode("a<box>b"))
    assert ids.count(free) == 1
    assert tokenizer.decode([*ids, free + 1]).strip() == "a<box>b"


def test_added_tokens_json_and_special_tokens_map(tmp_path, kind):
    name, json_file, free = kind
    folder = with_settings(tmp_path, name, json_file)
    (folder / "added_tokens.json").touch()
    known = json.loads((folder / "added_tokens.json").read_text() or "{}")
    more = {"<box>": free, "<|end|>": free + 1}
    (folder / "added_tokens.json").write_text(json.dumps(known | more))
    names = {"additional_special_tokens": ["<|end|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = family_of(folder).tokenizer
    assert list(tokenizer.encode("<box>")).count(free) == 1
    assert tokenizer.decode([free, free + 1]).strip() == "<box>"


@pytest.mark.parametrize(
    "named",
    [
        {"additional_special_tokens": ["<|end|>"]},
        {"additional_special_tokens": [{"content": "<|end|>"}]},
        {"extra_special_tokens": ["<|end|>"]},
        {"extra_special_tokens": {"end_token": "<|end|>"}},
        {"model_specific_special_tokens": {"end_token": "<|end|>"}},
        {"cls_token": "<|end|>"},
    ],
)
@pytest.mark.parametrize("json_file", [True, False], ids=["json", "model"])
def test_every_way_to_name_a_special_token(tmp_path, json_file, named):
    added = {"482": entry("<|end|>")}
    folder = with_settings(tmp_path, "llava", json_file, added=added, **named)
    tokenizer = family_of(folder).tokenizer
    assert "<|end|>" in tokenizer.special_tokens()
    assert tokenizer.token_id("<|end|>") == 482
    assert tokenizer.decode([482]) == ""


def transformers_for(json_file: bool):
    """transformers, where it is there and reads such a file as we do: 5.20, the last one for Python
    3.10, gives other ids for a tokenizer.model than 5.24."""
    transformers = pytest.importorskip("transformers")
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if not json_file and release < (5, 24):
        pytest.skip(f"transformers {transformers.__version__} reads a tokenizer.model otherwise")
    return transformers


@pytest.mark.parametrize("strips", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
@pytest.mark.parametrize("json_file", [True, False], ids=["json", "model"])
@pytest.mark.parametrize("text", ["a <box> b", "a<box>b", "<box>", "hello <pad>x", " a  b"])
def test_ids_are_those_of_transformers(tmp_path, json_file, strips, text):
    added = {"482": entry("<box>", normalized=False, **strips)}
    folder = with_settings(tmp_path, "llava", json_file, added=added)
    transformers = transformers_for(json_file)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = family_of(folder).tokenizer
    assert ours.encode(text) == theirs(text).input_ids
    ids = theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": False},
        {"bos_token": "<pad>"},
        {"legacy": True},
        {"legacy": None},
    ],
)
@pytest.mark.parametrize("json_file", [True, False], ids=["json", "model"])
def test_the_beginning_is_that_of_transformers(tmp_path, json_file, settings):
    folder = with_settings(tmp_path, "llava", json_file, **settings)
    transformers = transformers_for(json_file)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("hello <pad>x", " a  b", "</s>hello"):
        assert family_of(folder).tokenizer.encode(text) == theirs(text).input_ids


def test_tokens_that_two_files_place_differently_are_refused(tmp_path):
    folder = with_settings(tmp_path, "llava", added={"490": entry("<box>")})
    with pytest.raises(ModelError, match="'<box>' the id 490 in .* and 482 by tokenizer.json"):
        family_of(folder).tokenizer.encode("a")


TYPED = {
    "glm4": "<|user|>",
    "glm_edge": "<|assistant|>",
    "glm_edge_v": "<|begin_of_image|>",
    "llava": "</s>",
}


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("name, json_file", [*((name, True) for name in TYPED), ("llava", False)])
def test_special_tokens_that_a_message_spells_are_text(tmp_path, name, json_file, role):
    family = family_of(with_settings(tmp_path, name, json_file))
    typed = TYPED[name]
    last = {"role": "user", "content": "?"}

    def prompt(content):
        messages = [{"role": role, "content": content}]
        return family.prompt(messages if role == "user" else [*messages, last])

    try:
        plain = prompt("a b")
    except ModelError as error:
        assert "no system messages" in str(error)
        return
    marked = prompt(f"a{typed}b")
    special = {family.tokenizer.token_id(token) for token in family.tokenizer.special_tokens()}

    def specials(ids):
        return [token_id for token_id in ids.tolist() if token_id in special]

    assert specials(marked.ids) == specials(plain.ids)
    assert f"a{typed}b" in marked.text
    spelled = family.tokenizer.decode(marked.ids)
    assert f"a{typed}b" in spelled


@pytest.mark.parametrize("content", ["\ue000", "\ue0001\ue001", "\ufdd00\ufdd1", "\ue001x"])
@pytest.mark.parametrize("name", TYPED)
def test_private_characters_in_a_message_stay_what_they_are(name, content):
    family = family_of(paths.GOLDEN / name)
    ids = family.prompt([{"role": "user", "content": f"a{content}b"}]).ids
    shown = content if name == "glm4" else content.replace("\ufdd0", "\ufffd")
    assert f"a{shown}b" in family.tokenizer.decode(ids)


def test_descriptions_of_tools_are_text(tmp_path):
    source = (
        "<|system|>{{ tools | tojson }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    )
    family = family_of(with_settings(tmp_path, "glm4", chat_template=source))
    function = {"name": "f", "description": "<|user|>"}
    prompt = family.prompt(
        [{"role": "user", "content": "a"}], tools=[{"type": "function", "function": function}]
    )
    assert prompt.ids.tolist().count(family.tokenizer.token_id("<|user|>")) == 1


def test_the_longest_of_two_tokens_counts():
    tokens = [AddedToken("<a>", 1, False), AddedToken("<a><b>", 2, False)]
    found = list(TextSplitter(tokens).split("x<a><b><a>"))
    assert found == ["x", tokens[1], tokens[0]]
    assert list(TextSplitter([]).split("x<a>")) == ["x<a>"]
