"""Stand-in tokenizer files in the released formats and sizes, for synthetic checkpoints and the demo model.

Sentences flow in, the bytes of a vocabulary file flow out; the same input gives the same bytes.
"""
import io
import itertools
import string
from collections.abc import Iterable, Iterator

ICE_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
ICE_BLANKS = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81)))
ICE_CHINESE_FROM = 63823        # first id of the release's Chinese range
RARE = -14.0                    # log-probability of a filler piece: below every trained one

SENTENCES = (
    "描述这张图片。 问：这张图片里有什么？ 答：图片里有一只猫，坐在红色的沙发上。 问：它是什么颜色的？ 答：白色。",
    "<img></img> Q: Describe the picture. A: The picture shows a cat on a red sofa, next to a small table.",
    string.printable.strip(),
)


def ice_text(sentences: Iterable[str] = SENTENCES, base_pieces: int | None = None) -> bytes:
    """A sentencepiece file in the layout of ChatGLM-6B's `ice_text.model`.

    Order: <unk> <s> </s> <pad> <n>, pieces learnt from `sentences`, filler up to `base_pieces` (130000 in the release;
    None: no filler), 8 special pieces, tab and blanks, 256 bytes.
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


def _train(sentences: Iterable[str]) -> bytes:
    """Unigram pieces and, above all, sentencepiece's own NFKC normaliser table."""
    import sentencepiece
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(sentences) * 20), model_writer=trained, model_type="unigram", vocab_size=400,
        hard_vocab_limit=False, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        user_defined_symbols=["<n>"], num_threads=1, minloglevel=2)
    return trained.getvalue()


def _append(model, pieces: Iterable[str], kind: int, score: float = 0.0):
    for piece in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)


def _filler(first_id: int) -> Iterator[str]:
    """Made-up Latin words up to the Chinese range, then every common Chinese character and pairs of them."""
    syllables = ["".join(pair) for pair in itertools.product("bdfghklmnprstvz", "aeiou")]
    words = ("\u2581" + "".join(word) for word in itertools.product(syllables, repeat=3))
    yield from itertools.islice(words, ICE_CHINESE_FROM - first_id)
    characters = [chr(code) for code in range(0x4E00, 0x9FA6)]
    yield from characters
    yield from ("".join(pair) for pair in itertools.product(characters[:300], repeat=2))
