"""Stand-in tokenizer files in the released formats and sizes, for synthetic and demo checkpoints.

Takes sentences or pieces, returns the bytes of a vocabulary file: the same for the same input.
"""

import base64
import io
import itertools
import string
from collections.abc import Iterable, Iterator

from models.prompt.tokenizers.ranks import TiktokenTokenizer

ICE_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
ICE_BLANKS = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81)))
ICE_CHINESE_FROM = 63823  # first id of the release's Chinese range
RARE = -14.0  # log-probability of a filler piece: below every trained one

SENTENCES = (
    "描述这张图片。 问：这张图片里有什么？ 答：图片里有一只猫，坐在红色的沙发上。 问：它是什么颜色的？ 答：白色。",
    "<img></img> Q: Describe the picture. A: The picture shows a cat on a red sofa, next to a small table.",
    string.printable.strip(),
)


def ice_text(sentences: Iterable[str] = SENTENCES, base_pieces: int | None = None) -> bytes:
    """A sentencepiece file in the layout of ChatGLM-6B's `ice_text.model`.

    Order: <unk> <s> </s> <pad> <n>, pieces learnt from `sentences`, filler up to `base_pieces`
    (130000 in the release; None: no filler), 8 special pieces, tab and blanks, 256 bytes.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(_train(sentences))
    kind = proto.ModelProto.SentencePiece
    known = {piece.piece for piece in model.pieces}
    new = (piece for piece in _filler(len(known)) if piece not in known)
    filler = itertools.islice(new, max(0, (base_pieces or 0) - len(known)))
    _append(model, filler, kind.NORMAL, RARE)
    _append(model, ICE_SPECIAL, kind.CONTROL)
    _append(model, ICE_BLANKS, kind.USER_DEFINED)
    _append(model, (f"<0x{byte:02X}>" for byte in range(256)), kind.BYTE)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString(deterministic=True)


def byte_pieces(count: int) -> list[bytes]:
    """`count` pieces of a byte-level vocabulary: 256 bytes, then words and Chinese characters."""
    words = (piece.replace("\u2581", " ").encode() for piece in _filler(256))
    return [*(bytes([byte]) for byte in range(256)), *itertools.islice(words, count - 256)]


def rank_lines(pieces: Iterable[bytes]) -> bytes:
    """GLM-4's `tokenizer.model`: one "base64 rank" line per piece."""
    return b"".join(
        b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)
    )


def json_file_of(pieces: Iterable[bytes], special: Iterable[str]) -> bytes:
    """A `tokenizer.json` with the ids and the splitting of `rank_lines`; `special` come last."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    shown = byte_characters()
    vocabulary = {"".join(shown[byte] for byte in piece): rank for rank, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TiktokenTokenizer.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    return tokenizer.to_str().encode()


def llama_file(count: int, added: Iterable[str]) -> bytes:
    """A `tokenizer.json` like LLaMA's.

    3 control pieces, 256 bytes, then ASCII characters, made-up words and Chinese characters up to
    `count` pieces; `added` tokens come last.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    control = ("<unk>", "<s>", "</s>")
    pieces = itertools.chain(
        control,
        (f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        string.printable.strip(),
        _filler(0),
    )
    vocabulary = {piece: rank for rank, piece in enumerate(itertools.islice(pieces, count))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in (*control, *added)]
    )
    return tokenizer.to_str().encode()


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json (GPT-2's)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _train(sentences: Iterable[str]) -> bytes:
    """Unigram pieces and, above all, sentencepiece's own NFKC normaliser table."""
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(sentences) * 20),
        model_writer=trained,
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["<n>"],
        num_threads=1,
        minloglevel=2,
    )
    return trained.getvalue()


def _append(model, pieces: Iterable[str], kind: int, score: float = 0.0):
    for piece in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)


def _filler(first_id: int) -> Iterator[str]:
    """Made-up Latin words up to the Chinese range, then Chinese characters and pairs of them."""
    syllables = ["".join(pair) for pair in itertools.product("bdfghklmnprstvz", "aeiou")]
    words = ("\u2581" + "".join(word) for word in itertools.product(syllables, repeat=3))
    yield from itertools.islice(words, ICE_CHINESE_FROM - first_id)
    characters = [chr(code) for code in range(0x4E00, 0x9FA6)]
    yield from characters
    yield from ("".join(pair) for pair in itertools.product(characters[:300], repeat=2))
