"""What a model is: released checkpoints of the GLM families, read without their Python code.

Takes a checkpoint's directory, returns its Family.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError
from .other_kinds import refuse_other_files, refuse_other_folder, refuse_quantised
from .side_fields import shown
from .side_files import is_there, read_json

if TYPE_CHECKING:  # `--help` does without numpy
    from .family import Family

RELEASED = Path(__file__).parent / "released"  # configs of the released checkpoints, a file each

# module -> class; `known_families` imports the module
FAMILIES = {
    "visualglm": "VisualGLM",
    "glm4": "Glm4",
    "glm4_0414": "Glm4_0414",
    "glm4v": "Glm4V",
    "llava": "Llava",
    "glm_edge": "GlmEdge",
    "glm_ocr": "GlmOcr",
    "glm41v": "Glm41V",
}

# (fields of config.json as regular expressions, name, reason) of models that look alike, but are
# other networks
RELATIVES = (
    (
        {"model_type": "chatglm", "padded_vocab_size": "65024"},
        "ChatGLM2-6B, ChatGLM3-6B or CodeGeeX2-6B",
        "the generation before GLM-4, with another tokenizer; use glm-4-9b-chat",
    ),
    (
        {"model_type": "chatglm", "inner_hidden_size": r"\d+", "eva_config": "None"},
        "ChatGLM-6B (first generation)",
        "the language model of VisualGLM alone; "
        "use visualglm-6b, which also chats without a picture",
    ),
    (
        {"model_type": "glm4v_moe.*|glm46v_moe.*"},
        "GLM-4.5V or GLM-4.6V (106B)",
        "a mixture of experts; use GLM-4.6V-Flash",
    ),
    ({"model_type": "glm.*moe.*"}, "GLM-4.5 or later", "a mixture of experts; use glm-4-9b-chat"),
    ({"model_type": "qwen.*"}, "a Qwen model", "not of the GLM family"),
    (
        {"architectures": ".*CogVLM.*|.*CogAgent.*"},
        "a CogVLM model",
        "its decoder has separate weights for picture tokens; use glm-4v-9b",
    ),
    (
        {"model_type": "llava_.*|.*_llava"},
        "a later LLaVA model",
        "another image rule; use llava-1.5-7b-hf",
    ),
    (
        {
            "model_type": "llama|mistral.*|mixtral|deepseek.*|internlm.*|internvl.*|baichuan"
            "|gemma.*|phi.*|minicpm.*"
        },
        "a model of another family",
        "only GLM and LLaVA-1.5 models are known",
    ),
)


def known_families() -> list[type[Family]]:
    families = []
    for module, name in FAMILIES.items():
        families.append(getattr(import_module(f"{__name__}.families.{module}"), name))
    return families


def family_of(directory) -> Family:
    """The family that owns the checkpoint in `directory`, by the structure of its config.

    ModelError without such a directory or config, for a known relative, and if no family owns it.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ModelError(f"{directory} is a file; give --model its folder, {directory.parent}")
    if not directory.is_dir():
        raise ModelError(
            f"model folder {directory} does not exist; "
            "give --model the folder of a downloaded checkpoint"
        )
    refuse_other_folder(directory)
    sat = directory / "model_config.json"
    config = read_json(sat if is_there(sat) else directory / "config.json")
    refuse_quantised(directory, config)
    if relative := relative_of(config):
        name, reason = relative
        raise ModelError(
            f"{directory} holds {name} ({_kind(config)}), which this toolkit does not run: {reason}"
        )
    for family in known_families():
        rule = family.matches(config)
        if rule:
            return _build(family, directory, config, rule)
    refuse_other_files(directory)
    raise ModelError(
        f"{directory} holds no model this toolkit knows ({_kind(config)}); "
        f"known: {', '.join(FAMILIES)}"
    )


def relative_of(config: dict) -> tuple[str, str] | None:
    """(name, reason) of the known but unsupported model that `config` describes."""
    for fields, name, reason in RELATIVES:
        if all(re.fullmatch(wanted, str(config.get(field))) for field, wanted in fields.items()):
            return name, reason
    return None


def _kind(config) -> str:
    architectures = shown(config.get("architectures"))
    return f"model_type {shown(config.get('model_type'))}, architectures {architectures}"


def _build(family, directory, config, rule) -> Family:
    try:
        built = family(directory, config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"the config of {directory} looks like {family.name} ({rule}) but cannot be used "
            f"({type(error).__name__}: {error}); take config.json from the release"
        ) from None
    built.rule = rule
    return built
