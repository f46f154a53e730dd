"""Tokens that a fine-tune added: one id in prompts, visible in answers unless they are special."""

import json
import shutil

import paths
import pytest

from models import family_of

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
