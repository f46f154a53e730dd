"""Which checkpoint is whose: by the structure of config.json, with the rule in the message; relatives are refused."""

import json

import pytest

from models import RELATIVES, RELEASED, family_of, known_families, relative_of
from models.errors import ModelError

RELEASES = {
    "visualglm-6b": "visualglm",
    "glm-4-9b-chat": "glm-4",
    "glm-4-9b-chat-hf": "glm-4",
    "glm-4-9b-0414": "glm-4-0414",
    "glm-4v-9b": "glm-4v",
    "llava-1.5-7b": "llava-1.5",
    "glm-edge-1.5b-chat": "glm-edge",
    "glm-edge-4b-chat": "glm-edge",
    "glm-edge-v-2b": "glm-edge-v",
    "glm-edge-v-5b": "glm-edge-v",
}
REFUSED = {
    "ChatGLM3": {
        "model_type": "chatglm",
        "padded_vocab_size": 65024,
        "multi_query_group_num": 2,
        "num_layers": 28,
    },
    "ChatGLM-6B": {
        "model_type": "chatglm",
        "inner_hidden_size": 16384,
        "num_layers": 28,
        "vocab_size": 130528,
    },
    "GLM-4.5V": {"model_type": "glm4v_moe", "vision_config": {}},
    "GLM-4.5": {"model_type": "glm4_moe"},
    "Qwen": {"model_type": "qwen2_vl", "vision_config": {}},
    "CogVLM": {"architectures": ["CogVLMForCausalLM"], "vision_config": {}},
    "LLaVA": {"model_type": "llava_next", "vision_config": {}, "text_config": {}},
    "another family": {"model_type": "llama"},
}


def checkpoint(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("release, name", RELEASES.items())
def test_releases_are_known_by_their_structure(tmp_path, release, name):
    config = json.loads((RELEASED / f"{release}.json").read_text(encoding="utf-8"))["config"]
    config = {**config, "_name_or_path": "something/renamed", "architectures": None}
    family = family_of(checkpoint(tmp_path, config))
    assert family.name == name and family.rule.startswith("config.json has")
    assert sum(bool(each.matches(config)) for each in known_families()) == 1, (
        "rules exclude each other"
    )


@pytest.mark.parametrize("relative", REFUSED)
def test_relatives_are_refused_by_name_with_the_reason(tmp_path, relative):
    with pytest.raises(
        ModelError, match=f"{relative}.*which this toolkit does not run: .+"
    ) as error:
        family_of(checkpoint(tmp_path, REFUSED[relative]))
    assert "\n" not in str(error.value)


def test_every_row_of_the_table_is_tried():
    assert {relative_of(config) for config in REFUSED.values()} == {
        (name, reason) for _, name, reason in RELATIVES
    }


def test_unknown_and_incomplete_configs(tmp_path):
    with pytest.raises(ModelError, match="holds no model this toolkit knows .*'bert'.*known: "):
        family_of(checkpoint(tmp_path, {"model_type": "bert"}))
    with pytest.raises(ModelError, match="config.json has no hidden_size; take config.json"):
        family_of(checkpoint(tmp_path, {"model_type": "chatglm", "multi_query_group_num": 2}))
    with pytest.raises(ModelError, match="config.json is missing"):
        (tmp_path / "config.json").unlink()
        family_of(tmp_path)
