"""The released checkpoints that can be imitated, and the tokenizer files of each.

Takes a release's tokenizer_config.json and whether the real size is wanted; returns the tokenizer
files {name: bytes} and the fields of config.json that follow from them.
"""

import functools
import json

from models.families.glm4 import SPECIAL

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


def llava_files(tokenizer_config: dict, full: bool) -> tuple[dict[str, bytes], dict]:
    """LLaMA's 32,000 pieces (480 for tiny), <image> and <pad>."""
    count = 32000 if full else 480
    files = {"tokenizer.json": llama_file(count, ("<image>", "<pad>"))}
    files["tokenizer_config.json"] = as_json_bytes(tokenizer_config)
    return files, {"image_token_index": count, "pad_token_id": count + 1}


GLM_EDGE = {"json_file": True, "released": 59246}
# name of the file in released/ -> what makes its tokenizer files
RELEASES = {
    "visualglm-6b": visualglm_files,
    "glm-4-9b-chat": glm4_files,
    "glm-4-9b-chat-hf": functools.partial(glm4_files, json_file=True),
    "glm-4-9b-0414": functools.partial(glm4_files, json_file=True),
    "glm-4v-9b": glm4v_files,
    "llava-1.5-7b": llava_files,
    "glm-edge-1.5b-chat": functools.partial(glm4_files, **GLM_EDGE),
    "glm-edge-4b-chat": functools.partial(glm4_files, **GLM_EDGE),
    "glm-edge-v-2b": functools.partial(glm4v_files, **GLM_EDGE),
    "glm-edge-v-5b": functools.partial(glm4v_files, **GLM_EDGE),
}
