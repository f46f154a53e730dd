"""Builds the demo's `ice_text.model`: the released sentencepiece layout with the few words that the grammar needs.

Pieces: <unk> <s> </s> <pad> | <n> and normal pieces | [MASK] .. <dBLOCK> | <|tab|> <|blank_2|> .. <|blank_80|> | bytes.
"""

import io
import json
from pathlib import Path

import sentencepiece
from questions import COLOR, EXTREME, PLURAL, PROMPT, SHAPE, SIDE, SIZE, TRUTH, WORDING
from sentencepiece import sentencepiece_model_pb2 as proto

CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
IDS = {
    "mask_token_id": "[MASK]",
    "gmask_token_id": "[gMASK]",
    "bos_token_id": "<sop>",
    "eos_token_id": "<eop>",
    "pad_token_id": "<pad>",
}
SETTINGS = {
    "name_or_path": "THUDM/chatglm-6b",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def build(folder: Path) -> None:
    """Write ice_text.model and tokenizer_config.json."""
    model = _characters()
    for word in _words():
        _add(model, word, NORMAL, score=-1.0)  # above any chain of single characters
    for piece in CONTROLS:
        _add(model, piece, CONTROL)
    for piece in ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))):
        _add(model, piece, USER_DEFINED)
    for value in range(256):
        _add(model, f"<0x{value:02X}>", BYTE)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "ice_text.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=2))


def _words():
    """Whole words: English ones with the word-start mark, Chinese ones bare (the mark stands alone before them)."""
    english = []
    for form in WORDING.values():
        english += form["en"].replace("?", " ").replace(".", " ").split()
    for table in (COLOR, SHAPE, PLURAL, SIZE, EXTREME, SIDE, TRUTH):
        english += [w for phrase in table["en"] for w in phrase.split()]
    chinese = [w for table in (COLOR, SHAPE, EXTREME, SIDE) for w in table["zh"]]
    chinese += [
        "物体",
        "什么",
        "颜色",
        "形状",
        "大小",
        "图中有",
        "几个",
        "没有",
        "不是",
        "描述",
        "这张",
        "图片",
    ]
    plain = [w for w in english if "{" not in w]
    return list(
        dict.fromkeys(["▁" + w for w in plain] + chinese + ["<img>", "</img>", "img>", "Q:", "A:"])
    )


def _characters():
    """A sentencepiece model of single characters: all of the grammar's and printable ASCII."""
    text = [form[g] for form in WORDING.values() for g in form] + list(PROMPT.values())
    text.append("圆正三十方角形红橙黄绿青蓝紫黑色小中大有没是不、")
    text.append(" ".join(chr(c) for c in range(33, 127)))
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 5),
        model_writer=buffer,
        vocab_size=4000,
        model_type="char",
        character_coverage=1.0,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>"],
        minloglevel=2,
    )
    model = proto.ModelProto()
    model.ParseFromString(buffer.getvalue())
    model.trainer_spec.model_type = 1  # unigram: the words below compete with the characters
    for piece in model.pieces:
        if piece.type == NORMAL:
            piece.score = -10.0
    return model


def _add(model, piece, kind, score=0.0):
    if kind != NORMAL or piece not in {p.piece for p in model.pieces}:
        model.pieces.add(piece=piece, type=kind, score=score)


class Tokenizer:
    """The release's text rules on top of the file, as far as the grammar needs them."""

    def __init__(self, folder: Path):
        self.pieces = sentencepiece.SentencePieceProcessor(
            model_file=str(folder / "ice_text.model")
        )
        self.ids = {key: self.pieces.piece_to_id(piece) for key, piece in IDS.items()}
        self.vocabulary = -(-self.pieces.get_piece_size() // 16) * 16

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text.replace("\n", "<n>"))

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode(ids).strip()

    def prompt(self, question: str, language: str, rows: int) -> tuple[list[int], int]:
        """(ids up to <sop> with `rows` placeholders, index of the first placeholder)."""
        head = self.encode("<img>")
        tail = self.encode("</img>" + PROMPT[language].format(question))
        end = [self.ids["gmask_token_id"], self.ids["bos_token_id"]]
        return head + [0] * rows + tail + end, len(head)
