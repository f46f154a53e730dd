"""The released checkpoints that can be imitated, and the tokenizer files of each.

Takes a release's tokenizer_config.json and whether the real size is wanted; returns the tokenizer
files {name: bytes} and the fields of config.json that follow from them.
"""

import functools
import json

from models.families.glm4 import SPECIAL
from models.prompt.images import CLIP_MEAN, CLIP_STD

from .tokenizer_files import byte_pieces, ice_text, json_file_of, llama_file, rank_lines


def as_json_bytes(content: dict) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def visualglm_files(tokenizer_config: dict, full: bool) -> tuple[dict[str, bytes], dict]:
    """ChatGLM-6B's sentencepiece file, with all its pieces or without the filler."""
    import sentencepiece

    vocabulary = ice_text(base_pieces=130000 if full else None)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    special = {
        "bos_token_id": "<sop>",
        "eos_token_id": "<eop>",
        "mask_token_id": "[MASK]",
        "gmask_token_id": "[gMASK]",
    }
    fields = {field: pieces.piece_to_id(piece) for field, piece in special.items()}
    files = {"ice_text.model": vocabulary, "tokenizer_config.json": as_json_bytes(tokenizer_config)}
    return files, fields


def glm4_files(
    tokenizer_config: dict, full: bool, json_file: bool = False, released: int = 151329
) -> tuple[dict[str, bytes], dict]:
    """The same `released` pieces (291 for tiny) and the special ones behind them, in either layout.

    `tokenizer.model` of the `chatglm` layout or, with `json_file`, `tokenizer.json`.
    """
    pieces = byte_pieces(released if full else 291)
    ids = {piece: len(pieces) + i for i, piece in enumerate(SPECIAL)}
    added = {str(token_id): {"content": piece, "special": True} for piece, token_id in ids.items()}
    settings = {"added_tokens_decoder": added} | tokenizer_config
    files = {"tokenizer_config.json": as_json_bytes(settings)}
    if json_file:
        files["tokenizer.json"] = json_file_of(pieces, SPECIAL)
    else:
        files["tokenizer.model"] = rank_lines(pieces)
    eos = [ids[piece] for piece in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    return files, {"eos_token_id": eos, "pad_token_id": eos[0]}


def glm4v_files(tokenizer_config: dict, full: bool, **kind) -> tuple[dict[str, bytes], dict]:
    """As GLM-4's; the begin and end marks of an image follow <|observation|>."""
    files, fields = glm4_files(tokenizer_config, full, **kind)
    last = fields["eos_token_id"][-1]
    return files, fields | {"boi_token_id": last + 1, "eoi_token_id": last + 2}


def vl_files(
    tokenizer_config: dict, full: bool, released: int, more: tuple[str, ...], eos: tuple[str, ...]
) -> tuple[dict[str, bytes], dict]:
    """As GLM-4's, with `more` tokens behind the special ones, and the release's image settings.

    eos: the tokens that end an answer.
    """
    pieces = byte_pieces(released if full else 291)
    special = (*SPECIAL, *more)
    ids = {piece: len(pieces) + index for index, piece in enumerate(special)}
    added = {str(token_id): {"content": piece, "special": True} for piece, token_id in ids.items()}
    settings = {"added_tokens_decoder": added} | tokenizer_config
    files = {
        "tokenizer.json": json_file_of(pieces, special),
        "tokenizer_config.json": as_json_bytes(settings),
        "preprocessor_config.json": as_json_bytes(PICTURES),
    }
    fields = {f"{name}_token_id": ids[token] for name, token in PICTURE_TOKENS.items()}
    text = {"eos_token_id": [ids[token] for token in eos], "pad_token_id": ids["<|endoftext|>"]}
    return files, fields | {"text_config": text}


def llava_files(tokenizer_config: dict, full: bool) -> tuple[dict[str, bytes], dict]:
    """LLaMA's 32,000 pieces (480 for tiny), <image> and <pad>."""
    count = 32000 if full else 480
    files = {"tokenizer.json": llama_file(count, ("<image>", "<pad>"))}
    files["tokenizer_config.json"] = as_json_bytes(tokenizer_config)
    return files, {"image_token_index": count, "pad_token_id": count + 1}


PICTURES = {
    "image_processor_type": "Glm46VImageProcessor",
    "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
PICTURE_TOKENS = {
    "image": "<|image|>",
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "video": "<|video|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
}
THOUGHT = ("<think>", "</think>")
BOX = ("<|begin_of_box|>", "<|end_of_box|>")
OF_41V = ("<|image|>", "<|video|>", *THOUGHT, "<answer>", "</answer>", *BOX)
OF_45 = (  # GLM-4.5's order, which later releases keep
    *("<|begin_of_audio|>", "<|end_of_audio|>"),
    *("<|begin_of_transcription|>", "<|end_of_transcription|>"),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"),
    *THOUGHT,
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "/nothink",
    *BOX,
    *("<|image|>", "<|video|>"),
)
CHAT_EOS = ("<|endoftext|>", "<|user|>", "<|observation|>")
GLM_EDGE = {"json_file": True, "released": 59246}
# name of the file in released/ -> what makes its tokenizer files
RELEASES = {
    "visualglm-6b": visualglm_files,
    "glm-4-9b-chat": glm4_files,
    "glm-4-9b-chat-hf": functools.partial(glm4_files, json_file=True),
    "glm-4-9b-0414": functools.partial(glm4_files, json_file=True),
    "glm-4v-9b": glm4v_files,
    "glm-4.1v-9b-thinking": functools.partial(
        vl_files, released=151329, more=OF_41V, eos=(*CHAT_EOS, "</answer>")
    ),
    "glm-4.6v-flash": functools.partial(vl_files, released=151329, more=OF_45, eos=CHAT_EOS),
    "glm-ocr": functools.partial(
        vl_files, released=59246, more=OF_45, eos=("<|endoftext|>", "<|user|>")
    ),
    "llava-1.5-7b": llava_files,
    "glm-edge-1.5b-chat": functools.partial(glm4_files, **GLM_EDGE),
    "glm-edge-4b-chat": functools.partial(glm4_files, **GLM_EDGE),
    "glm-edge-v-2b": functools.partial(glm4v_files, **GLM_EDGE),
    "glm-edge-v-5b": functools.partial(glm4v_files, **GLM_EDGE),
}
