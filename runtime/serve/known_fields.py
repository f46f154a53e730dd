"""Fields that OpenAI, vLLM, llama.cpp and SGLang define and this server does not do, as data.

Each has the values that change nothing; null is one of them everywhere. With any other value the
client relies on something that would not happen, so the request is refused and the field is named.
Names that none of these servers know are ignored, as those servers ignore them.
"""

import json

from .errors import ApiError

# openai-python 2: types/chat/completion_create_params.py, types/completion_create_params.py
OPENAI = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({}, []),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
}
# vllm/entrypoints/openai/chat_completion/protocol.py and completion/protocol.py; guided_* and
# structural_tag are their names before structured_outputs
VLLM = {
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json_object": (False,),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_prompt_text": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    # what templates of other models ask for; the families here do not think aloud
    "chat_template_kwargs": ({}, {"enable_thinking": False}, {"thinking": False}),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "prompt_embeds": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "watermarking": (False,),
    "vllm_xargs": ({},),
    "return_token_strs": (False,),
    "cache_salt": (),  # keeps a prompt's cached blocks from others
    "priority": (0,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
}
# tools/server/README.md of llama.cpp: options of POST /completion, which its /v1 routes take, too
LLAMA_CPP = {
    "grammar": ("",),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "json_schema": (),
    "n_predict": (-1,),
    "n_probs": (0,),
    "min_keep": (0,),
    "repeat_penalty": (1,),
    "dynatemp_range": (0,),
    "typical_p": (1,),
    "top_n_sigma": (-1,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "mirostat": (0,),
    "adaptive_target": (-1,),
    "samplers": (),
    "n_indent": (0,),
    "t_max_predict_ms": (0, -1),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
    "lora": ([],),
    "response_fields": (),
    "multimodal_data": (),
}
# python/sglang/srt/entrypoints/openai/protocol.py
SGLANG = {
    "regex": (),
    "ebnf": (),
    "stop_regex": (),
    "no_stop_trim": (False,),
    "custom_logit_processor": (),
    "lora_path": (),
    "return_hidden_states": (False,),
}
# Fields of one of OpenAI's endpoints that do nothing at the other.
OF_CHATS = {
    "messages": (),
    "max_completion_tokens": (),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
OF_COMPLETIONS = {"prompt": (), "echo": (False,), "add_special_tokens": (False,)}
NEUTRAL = {**SGLANG, **LLAMA_CPP, **VLLM, **OPENAI}


def check_known_fields(given: dict | None, foreign: dict):
    """Raises ApiError for the first field whose value asks for something that is not done here.
    foreign: fields of the other endpoint."""
    known = {**NEUTRAL, **foreign}
    for name, value in (given or {}).items():
        if name in known and value is not None and not is_neutral(value, known[name]):
            where = "at this endpoint" if name in foreign else "by this server"
            raise unsupported(name, where, known[name])


def is_neutral(value, neutral: tuple) -> bool:
    """Whether `value` is one of `neutral`; True is not 1, and False not 0."""
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    return any(value == other and is_flag(value) == is_flag(other) for other in neutral)


def is_flag(value) -> bool:
    return isinstance(value, bool)


def unsupported(name: str, where: str, neutral: tuple) -> ApiError:
    message = f"{name} is not supported {where}; leave it out"
    if neutral:
        message += f", or give {' or '.join(map(as_json, neutral))}"
    return ApiError(message, 400, "unsupported_parameter", name)


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)
