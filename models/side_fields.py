"""The known fields of a checkpoint's side files: which type and range each must have.

Takes a file's name and a field's place in it ("vision_config.patch_size"), returns a rule. The ranges are far beyond
every released model; they hold back numbers that would be used as sizes and counts before anything else is checked.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

SHOWN = 60  # characters of a value in a message
MOST_ADDED = 6_400  # tokens beside a vocabulary
LONGEST_ADDED = 1_000  # characters
LARGEST_ID = (1 << 31) - 1
ADDED_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def shown(value) -> str:
    """A value of a stranger's file for a message: short, one line, nothing invisible."""
    if value is None:
        return "null"
    short = reprlib.Repr()
    short.maxstring = short.maxother = SHOWN
    short.maxlevel = 2
    return short.repr(value)[: 2 * SHOWN]


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    fits: Callable[[object], bool]


def is_whole(value, least: int, most: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def is_real(value, least: float, most: float) -> bool:
    """Infinite values and NaN are in no range."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and least <= value <= most


def is_text(value) -> bool:
    return isinstance(value, str)


def is_token(value) -> bool:
    """A text of a token's length, or a table whose "content" is one."""
    text = value.get("content") if isinstance(value, dict) else value
    return is_text(text) and len(text) <= LONGEST_ADDED


def is_template(value) -> bool:
    """A template, or several named ones."""
    if isinstance(value, dict):
        return all(map(is_text, value.values()))
    if isinstance(value, list):
        return all(is_named_template(entry) for entry in value)
    return is_text(value)


def is_named_template(entry) -> bool:
    return isinstance(entry, dict) and is_text(entry.get("name")) and is_text(entry.get("template"))


def is_added(value) -> bool:
    """{"id": {"content": text, ...}, ...}"""
    if not isinstance(value, dict) or len(value) > MOST_ADDED:
        return False
    return all(
        name.isascii() and name.isdigit() and len(name) < 10 and is_added_token(entry)
        for name, entry in value.items()
    )


def is_added_token(entry) -> bool:
    """{"content": text, "special": true, ...}; an empty one would be found everywhere, without end."""
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str) or not 0 < len(content) <= LONGEST_ADDED:
        return False
    flags = [entry.get(name) for name in ADDED_FLAGS]
    return all(flag is None or isinstance(flag, bool) for flag in flags)


def whole(least: int, most: int) -> Rule:
    words = f"a whole number from {least:,} to {most:,}"
    return Rule(words, lambda value: is_whole(value, least, most))


def real(least: float, most: float) -> Rule:
    return Rule(f"a number from {least:g} to {most:g}", lambda value: is_real(value, least, most))


def lists_of(rule: Rule, least: int = 0, most: int = 1000) -> Rule:
    return Rule(
        f"a list of {least} to {most:,} values, each {rule.words}",
        lambda value: (
            isinstance(value, list) and least <= len(value) <= most and all(map(rule.fits, value))
        ),
    )


def either(first: Rule, second: Rule) -> Rule:
    return Rule(
        f"{first.words}, or {second.words}", lambda value: first.fits(value) or second.fits(value)
    )


def count(least: int) -> Rule:
    """A whole float such as 50.0 counts, too."""
    return Rule(
        f"a whole number from {least} up",
        lambda value: is_real(value, least, LARGEST_ID) and value == int(value),
    )


TEXT = Rule("a text", is_text)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TABLE = Rule("a table {...}", lambda value: isinstance(value, dict))
TEXTS = Rule(
    "a table of texts",
    lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
)
TOKEN = Rule('a text, or a table with a text as "content"', is_token)
TOKENS = either(
    lists_of(TOKEN, 0, MOST_ADDED),
    Rule(
        "a table of tokens",
        lambda value: isinstance(value, dict) and all(map(is_token, value.values())),
    ),
)
WIDTH = whole(1, 1 << 18)
HEADS = whole(1, 1 << 12)
LAYERS = whole(1, 1000)
PIECES = whole(1, 1 << 24)
POSITIONS = whole(1, 1 << 27)
SIDE = whole(1, 1 << 13)
SQUARE = Rule(
    "a list of two equal sides of up to 8,192 pixels",
    lambda value: lists_of(SIDE, 2, 2).fits(value) and value[0] == value[1],
)
ID = whole(-1, LARGEST_ID)
IDS = either(ID, lists_of(ID))
EPSILON = real(0, 1)
MEANS = either(real(-1e6, 1e6), lists_of(real(-1e6, 1e6), 3, 3))
DEVIATIONS = either(real(1e-6, 1e6), lists_of(real(1e-6, 1e6), 3, 3))

CONFIG = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "inner_hidden_size"), WIDTH),
    **dict.fromkeys(("ffn_hidden_size", "cross_attn_hidden_size"), WIDTH),
    **dict.fromkeys(("num_layers", "num_hidden_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), HEADS),
    **dict.fromkeys(("multi_query_group_num", "head_dim", "kv_channels"), HEADS),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), PIECES),
    **dict.fromkeys(("max_position_embeddings", "seq_length"), POSITIONS),
    "max_sequence_length": whole(0, 1 << 27),
    **dict.fromkeys(("image_size", "patch_size"), SIDE),
    **dict.fromkeys(("eva_config.image_size", "eva_args.image_size"), SQUARE),
    **dict.fromkeys(("qformer_config.vocab_size", "qformer_args.vocab_size"), whole(1, 1 << 14)),
    "vision_feature_layer": either(whole(-1000, 1000), lists_of(whole(-1000, 1000))),
    "num_positions": whole(1, 1 << 26),
    "qformer_config.is_decoder": lists_of(FLAG, 1),
    "qformer_args.is_decoder": lists_of(FLAG, 1),
    **dict.fromkeys(("layer_norm_eps", "layernorm_epsilon", "rms_norm_eps"), EPSILON),
    "rope_theta": real(1, 1e15),
    "rope_ratio": real(1e-6, 1e9),
    "partial_rotary_factor": real(1e-6, 1),
    "mrope_section": lists_of(whole(0, 1 << 12), 1, 8),
    "scaling_factor": real(1e-6, 1e6),
    **dict.fromkeys(("attention_bias", "mlp_bias", "add_qkv_bias"), FLAG),
    **dict.fromkeys(("tie_word_embeddings", "multimodal_projector_bias"), FLAG),
    **dict.fromkeys(("model_type", "hidden_act", "projector_hidden_act", "rope_type"), TEXT),
    **dict.fromkeys(("torch_dtype", "dtype", "vision_feature_select_strategy"), TEXT),
    **dict.fromkeys(("text_config", "vision_config", "eva_config", "qformer_config"), TABLE),
    **dict.fromkeys(("eva_args", "qformer_args", "rope_parameters", "rope_scaling"), TABLE),
    "quantization_config": TABLE,
    **dict.fromkeys(("bos_token_id", "pad_token_id", "mask_token_id", "gmask_token_id"), ID),
    **dict.fromkeys(("boi_token_id", "eoi_token_id"), ID),
    **dict.fromkeys(("image_token_index", "image_token_id"), ID),
    "eos_token_id": IDS,
}
TOKENIZER = {
    "added_tokens_decoder": Rule(
        f'a table of up to {MOST_ADDED:,} ids, each with a text of 1 to {LONGEST_ADDED:,} characters as "content"',
        is_added,
    ),
    "chat_template": Rule("a text, or named texts", is_template),
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "sep_token"), TOKEN),
    **dict.fromkeys(("pad_token", "cls_token", "mask_token"), TOKEN),
    "additional_special_tokens": lists_of(TOKEN, 0, MOST_ADDED),
    **dict.fromkeys(("extra_special_tokens", "model_specific_special_tokens"), TOKENS),
    **dict.fromkeys(("add_bos_token", "legacy"), FLAG),
}
PREPROCESSOR = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), FLAG),
    **dict.fromkeys(("do_pad", "do_convert_rgb", "default_to_square"), FLAG),
    **dict.fromkeys(("image_processor_type", "feature_extractor_type"), TEXT),
    "image_processor": TABLE,
    "image_mean": MEANS,
    "image_std": DEVIATIONS,
    "rescale_factor": real(0, 1e6),
    "resample": whole(0, 5),
    **dict.fromkeys(("size", "crop_size"), either(SIDE, TABLE)),
    **dict.fromkeys(("height", "width"), SIDE),
    **dict.fromkeys(("shortest_edge", "longest_edge"), whole(1, 1 << 27)),  # some count pixels
    "max_image_tiles": whole(1, 1 << 10),
}
SAMPLING = {
    "temperature": Rule("a number from 0 up", lambda value: is_real(value, 0, 1e300)),
    "top_p": Rule(
        "a number above 0 and up to 1", lambda value: value != 0 and is_real(value, 0, 1)
    ),
    "top_k": count(0),
    "min_p": real(0, 1),
    "repetition_penalty": real(0.01, 100),
    "max_new_tokens": count(1),
}
STOP_IDS = either(whole(0, LARGEST_ID), lists_of(whole(0, LARGEST_ID)))
GENERATION = SAMPLING | {"do_sample": FLAG, "max_length": count(1), "eos_token_id": STOP_IDS}
INDEX = {"weight_map": TEXTS}
ANY_FIELD = "*"  # of a file whose fields are no fixed names
FILES = {
    "config.json": CONFIG,
    "model_config.json": CONFIG,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": TOKENIZER,
    "chat_template.json": TOKENIZER,
    "added_tokens.json": {ANY_FIELD: whole(0, LARGEST_ID)},
    "generation_config.json": GENERATION,
    "preprocessor_config.json": PREPROCESSOR,
    "processor_config.json": PREPROCESSOR,
}


def rules_of(file: str) -> dict[str, Rule]:
    """The rules of the file of that name: of a field by its place in the file, or by its last name."""
    return INDEX if file.endswith(".index.json") else FILES.get(file, {})
