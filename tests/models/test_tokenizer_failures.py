"""What a stranger's tokenizer does to the libraries in C++ and Rust: an error, a panic or an abort is one sentence."""

import base64
import json
import shutil

import pytest
from paths import GOLDEN

from models import family_of
from models.errors import ModelError
from models.prompt import tokenizer_limits
from models.prompt.tokenizers.json_file import JsonTokenizer
from models.prompt.tokenizers.ranks import TiktokenTokenizer
from models.prompt.tokenizers.sentencepiece_model import SentencePieceTokenizer

ABORT = "import os, sys\nos.abort()\n"
LOOP = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (1, 9))
while True: pass
"""


def tokenizer_json(tmp_path, **changed):
    content = json.loads((GOLDEN / "llava" / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | changed))
    return tmp_path / "tokenizer.json"


def test_a_panic_while_decoding(tmp_path):
    """pyo3's PanicException is a BaseException, which would end a service's engine."""
    strip = {"type": "Strip", "content": "e", "start": 0, "stop": 1 << 31}
    tokenizer = JsonTokenizer(tokenizer_json(tmp_path, decoder=strip))
    with pytest.raises(ModelError, match="tokenizer.json cannot make a text of these tokens"):
        tokenizer.decode(range(400))


def test_an_id_beyond_the_vocabulary_has_no_bytes():
    assert JsonTokenizer(GOLDEN / "llava" / "tokenizer.json").part_bytes(1 << 30) == b""


@pytest.mark.parametrize(
    "token, words",
    [("", "1 to 1,000 characters"), ("v" * 1001, "1 to 1,000 characters"), ("\ud800", "half a")],
)
def test_added_tokens_of_a_config(token, words, tmp_path):
    """An empty one was looked for without end; a long one broke the library."""
    shutil.copy(GOLDEN / "glm4" / "tokenizer.model", tmp_path)
    added = {"added_tokens_decoder": {"300": {"content": token, "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    with pytest.raises(ModelError, match=words):
        TiktokenTokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("count, content", [(1, ""), (1, "v" * 1001), (6401, "<{}>")])
def test_added_tokens_of_a_tokenizer_file(count, content, tmp_path):
    added = [{"id": 400 + i, "content": content.format(i), "special": True} for i in range(count)]
    with pytest.raises(ModelError, match="must list up to 6,400 added_tokens"):
        JsonTokenizer(tokenizer_json(tmp_path, added_tokens=added))


def test_a_text_in_front_of_every_text(tmp_path):
    prepend = {"type": "Prepend", "prepend": "a" * (1 << 20)}
    with pytest.raises(ModelError, match="has a normalizer .* times as long"):
        JsonTokenizer(tokenizer_json(tmp_path, normalizer=prepend))


def test_a_text_that_a_library_cannot_cut():
    """A million blanks exhaust the stack of tiktoken's regular expressions."""
    tokenizer = TiktokenTokenizer(GOLDEN / "glm4" / "tokenizer.model")
    with pytest.raises(ModelError, match="tokenizer.model cannot cut this text into tokens"):
        tokenizer.encode(" " * 1_000_000)


def test_many_control_pieces(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    content = (GOLDEN / "llava" / "tokenizer.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    for number in range(6_500):
        model.pieces.add(piece=f"<c{number}>", score=0, type=3)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="control pieces, 6,400 are the most"):
        SentencePieceTokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("token_id", ["5", -1, 1.5, 1 << 31, True])
def test_ids_of_added_tokens(token_id, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(GOLDEN / "llava", folder, ignore=shutil.ignore_patterns("*.npz"))
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": token_id}))
    with pytest.raises(ModelError, match="must be a whole number from 0 to 2,147,483,647"):
        family_of(folder).tokenizer.encode("hello")


@pytest.mark.parametrize(
    "program, words",
    [(ABORT, r"ends its library \(SIGABRT\)"), (LOOP, r"takes its library too long \(SIGXCPU\)")],
)
def test_an_abort_ends_another_process(program, words, tmp_path, monkeypatch):
    """Of every kind of tokenizer: nothing of a library is called here before it was tried there."""
    (tmp_path / "dies.py").write_text(program)
    monkeypatch.setattr(tokenizer_limits, "PROCESS", "dies")
    monkeypatch.setattr(tokenizer_limits, "ROOT", tmp_path)
    for model in ("glm4", "glm_edge", "llava", "visualglm"):
        tokenizer_limits._end_of_trial.cache_clear()
        with pytest.raises(ModelError, match=f"{model}/.* {words}"):
            print(family_of(GOLDEN / model).tokenizer)
    with pytest.raises(ModelError, match=words):
        SentencePieceTokenizer(GOLDEN / "llava" / "tokenizer.model")
    tokenizer_limits._end_of_trial.cache_clear()


def test_a_sound_file_survives(tmp_path):
    """A sound file comes through: what the process does is not the reason that another one fails."""
    lines = [base64.b64encode(bytes([byte])).decode() + f" {byte}" for byte in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    arguments = ("TiktokenTokenizer", tmp_path / "tokenizer.model", json.dumps([[]]))
    assert tokenizer_limits._end_of_trial(*arguments) == 0
