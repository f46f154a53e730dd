"""Every side file of every family, and every field in it, set to what it cannot be: used or one sentence, never another error."""

import json
import shutil

import numpy as np
import paths
import pytest
from PIL import Image

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import stored_weights
from models.errors import ModelError
from models.prompt import tokenizer_limits

FOLDERS = {
    "glm4": ("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    "glm4/hf": ("generation_config.json",),
    "glm4v": ("preprocessor_config.json", "special_tokens_map.json"),
    "glm_edge": ("special_tokens_map.json", "added_tokens.json"),
    "glm_edge_v": ("preprocessor_config.json", "model.safetensors.index.json"),
    "llava": (
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "model.safetensors.index.json",
    ),
    "visualglm": ("generation_config.json", "added_tokens.json"),
    "msmodelslim/glm_bf16_w8a8": ("quant_model_description.json",),
    "msmodelslim/glm_f16_cli_v1_w8a8_static": (
        "quant_model_description.json",
        "quant_model_weights.safetensors.index.json",
    ),
}
# of files that a golden folder lacks
EXAMPLES = {
    "added_tokens.json": {"<box>": 508},
    "special_tokens_map.json": {"cls_token": {"content": "<box>"}, "extra_special_tokens": ["<x>"]},
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
    "generation_config.json": {"do_sample": True, "top_k": 5, "eos_token_id": 2, "min_p": 0.1},
    "preprocessor_config.json": {"size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3},
    "processor_config.json": {"image_processor": {"crop_size": {"height": 56, "width": 56}}},
}
CASES = [(folder, file) for folder, files in FOLDERS.items() for file in files]
STRANGE = (None, "4", [], {}, -1, 10**9, 0.5, True, [None], {"a": None})
CONTENTS = (b"[]", b"null", b'"abc"', b"5", b"", b"{", b"\xff", '{"a": "好"}'.encode("gbk"))
PICTURE = Image.fromarray(np.zeros((45, 60, 3), np.uint8))


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """Sound tokenizer files need no trial in a process of their own."""
    monkeypatch.setattr(tokenizer_limits, "is_trial", True)


def copied(tmp_path, folder):
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in (paths.GOLDEN / folder).iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        elif file.is_file() and file.suffix not in (".npz", ".gz"):
            shutil.copyfile(file, copy / file.name)
    return copy


def use(folder):
    """As a command does up to the first step, without reading weights."""
    family = family_of(folder)
    Checkpoint(folder).check(stored_weights(family))
    try:
        family.prompt([{"role": "user", "content": "hello"}], family.languages[0])
    except ModelError as error:
        if not ("is missing" in str(error) or "have no" in str(error)):
            raise
    if family.vision:
        family.pixels(PICTURE)
    return family.sampling(False), family.chat_sampling(True)


def is_used_or_refused(folder):
    try:
        use(folder)
    except ModelError as error:
        assert len(str(error)) < 5000


def places(fields, where=()):
    """The way to the fields, those of tables in it too; of a table of many the first three."""
    for name, value in list(fields.items())[:3] if len(fields) > 30 else fields.items():
        yield (*where, name)
        if isinstance(value, dict):
            yield from places(value, (*where, name))


@pytest.mark.parametrize("folder, name", CASES)
def test_every_field_is_used_or_refused(tmp_path, folder, name):
    file = copied(tmp_path, folder) / name
    fields = json.loads(file.read_text()) if file.exists() else EXAMPLES[name]
    for place in places(fields):
        for value in STRANGE:
            changed = json.loads(json.dumps(fields))
            table = changed
            for part in place[:-1]:
                table = table[part]
            table[place[-1]] = value
            file.write_text(json.dumps(changed))
            is_used_or_refused(file.parent)
    file.write_text(json.dumps(fields | {"new_field": {"x": [1, {"y": None}]}}))
    if name != "added_tokens.json":
        use(file.parent)


@pytest.mark.parametrize("folder, name", CASES)
def test_a_file_that_is_no_table_is_named(tmp_path, folder, name):
    file = copied(tmp_path, folder) / name
    for content in CONTENTS:
        file.write_bytes(content)
        with pytest.raises(ModelError, match=name):
            use(file.parent)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("folder, name", CASES)
def test_other_encodings_of_unicode_are_read(tmp_path, folder, name, encoding):
    file = copied(tmp_path, folder) / name
    text = file.read_text() if file.exists() else json.dumps(EXAMPLES[name])
    file.write_bytes(text.encode(encoding))
    use(file.parent)
