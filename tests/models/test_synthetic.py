"""Synthetic checkpoints: released names and shapes, the same bytes after any interruption, a tokenizer that works."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import paths
import pytest
import torch

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.table import Weight
from models.errors import ModelError
from models.side_files import read_json
from models.synthetic import __main__ as synthetic
from models.synthetic import write as writing
from models.synthetic.tokenizer_files import ice_text
from models.synthetic.write import write_checkpoint

GOLDEN = paths.GOLDEN
PARAMETERS = 7_802_193_408  # of the release; its 28 rotary tables of 32 frequencies come on top


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 200_000)


def write(out, **options):
    write_checkpoint("visualglm-6b", out, scale="tiny", report=lambda line: None, **options)
    return {file.name: file.read_bytes() for file in Path(out).iterdir()}


def test_full_size_names_and_shapes_are_the_releases(tmp_path):
    expected = json.loads(gzip.decompress((GOLDEN / "visualglm_tensors.json.gz").read_bytes()))
    config = read_json(writing.RELEASED / "visualglm-6b.json")["config"]
    shards, index = writing._plan(config, tmp_path, {})
    assert {w.source: list(w.shape) for shard in shards for w in shard.weights} == expected
    assert index["metadata"]["total_size"] == 2 * (PARAMETERS + 28 * 32)
    assert all(shard.size < 2.01e9 for shard in shards)


def test_tiny_checkpoint_is_whole(tmp_path, small_shards):
    files = write(tmp_path)
    family = family_of(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(family.weights())
    assert len(checkpoint.files) > 2 and checkpoint.dtype("lm_head.weight") == torch.float16
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"]) == set(checkpoint.names)
    assert index["metadata"]["total_size"] == sum(map(checkpoint.nbytes, checkpoint.names))
    assert {"config.json", "tokenizer_config.json", "ice_text.model"} < set(files)


def test_tiny_prompt_ids_are_inside_the_vocabulary(tmp_path):
    write(tmp_path)
    family = family_of(tmp_path)
    prompt = family.prompt([{"role": "user", "content": "描述 it \t 日本語 😀"}])
    assert prompt.ids.max() < family.decoder.vocab_size
    assert family.stop_ids == (family.tokenizer.piece_id("<eop>"),)


def test_values_are_sensible(tmp_path):
    write(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    matrix, norm, bias = (
        checkpoint.tensor(name).float()
        for name in (
            "lm_head.weight",
            "transformer.final_layernorm.weight",
            "transformer.final_layernorm.bias",
        )
    )
    assert abs(matrix.mean()) < 1e-3 and abs(matrix.std() - 0.02) < 1e-3
    assert abs(norm.mean() - 1) < 0.02 and abs(bias.mean()) < 0.02


def test_a_large_tensor_does_not_repeat_its_rows(monkeypatch):
    monkeypatch.setattr(writing, "BLOCK", 4096)
    weight = Weight("m.weight", (256, 64))
    raw = b"".join(writing._tensor_blocks(weight, "float16", 0))
    matrix = torch.frombuffer(bytearray(raw), dtype=torch.float16).reshape(256, 64).float()
    assert len(matrix.unique(dim=0)) == 256


def test_seed_and_name_decide_the_bytes(tmp_path):
    first, again, other = (
        write(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again and first["config.json"] == other["config.json"]
    name = "model-00001-of-00001.safetensors"
    assert first[name] != other[name]


class Killed(BaseException):
    """Nothing handles it: the run stops as if killed, and may leave its .part file."""


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, small_shards):
    expected = write(tmp_path / "whole")

    def stop(done, total):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        write(tmp_path / "resumed", progress=stop)
    left = {file.name for file in (tmp_path / "resumed").iterdir()}
    assert "config.json" not in left and any(name.endswith(".safetensors") for name in left)
    kept = tmp_path / "resumed" / "model-00001-of-00005.safetensors"
    before = kept.stat().st_mtime_ns
    assert write(tmp_path / "resumed") == expected and kept.stat().st_mtime_ns == before


def test_another_seed_replaces_the_old_shards(tmp_path, small_shards):
    write(tmp_path / "a", seed=1)
    assert write(tmp_path / "a", seed=0) == write(tmp_path / "b", seed=0)


def test_killed_process_leaves_nothing_that_looks_whole(tmp_path, small_shards):
    """kill -9 in the middle of a shard, then the same command again."""
    slowly = f"""if True:
        import time, models.synthetic.write as s
        from models.synthetic.__main__ import main
        s.SHARD_BYTES, blocks = {writing.SHARD_BYTES}, s._tensor_blocks
        s._tensor_blocks = lambda *a: (time.sleep(0.05), *blocks(*a))[1:]
        main(["--like", "visualglm-6b", "--scale", "tiny", "--out", {str(tmp_path / "a")!r}])"""
    process = subprocess.Popen([sys.executable, "-c", slowly], stdout=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not list(tmp_path.glob("a/model-00002*")) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "a" / "config.json").exists()
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_refusals(tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir()
    (real / "pytorch_model.bin").write_bytes(b"precious")
    with pytest.raises(ModelError, match="holds files of something else"):
        write(real)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model-00001-of-00001.safetensors").write_bytes(b"precious")
    with pytest.raises(ModelError, match="holds files of something else"):
        write(tmp_path / "mine")
    with pytest.raises(ModelError, match="is a file"):
        write(real / "pytorch_model.bin")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(ModelError, match="needs 905.0 kB, its disk has 9 bytes free"):
        write(tmp_path / "full")


def test_command_says_mistakes_in_a_line(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert (
        synthetic.main(["--like", "visualglm-6b", "--scale", "tiny", "--out", str(tmp_path / "x")])
        == 2
    )
    assert capsys.readouterr().err == f"error: {tmp_path / 'x'} is a file; choose another --out\n"


def test_ice_text_has_the_released_layout():
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=ice_text(base_pieces=130000))
    assert pieces.get_piece_size() == 130344
    released = {
        "<unk>": 0,
        "<pad>": 3,
        "<n>": 4,
        "[MASK]": 130000,
        "[gMASK]": 130001,
        "<sop>": 130004,
        "<eop>": 130005,
        "<|tab|>": 130008,
        "<|blank_2|>": 130009,
        "<|blank_80|>": 130087,
        "<0x00>": 130088,
        "<0xFF>": 130343,
    }
    assert {piece: pieces.piece_to_id(piece) for piece in released} == released
    for text in ("描述这张图片。", "Hello, wide world 123", "ё 😀"):
        assert pieces.decode(pieces.encode(text)) == text


@pytest.mark.parametrize(
    "like, tensors, parameters",
    [
        ("glm-ocr", 510, 1_107_405_824),
        ("glm-4.1v-9b-thinking", 704, 10_292_777_472),
        ("glm-4.6v-flash", 704, 10_292_777_472),
    ],
)
def test_releases_with_pictures_of_any_size(tmp_path, like, tensors, parameters):
    """Full size as the original classes have it; tiny with a picture through the whole prompt."""
    config, _ = writing._release(like, "full")
    _, index = writing._plan(config, tmp_path, {})
    assert len(index["weight_map"]) == tensors
    assert index["metadata"]["total_size"] == 2 * parameters
    write_checkpoint(like, tmp_path / "tiny", scale="tiny", report=lambda line: None)
    family = family_of(tmp_path / "tiny")
    Checkpoint(tmp_path / "tiny").check(family.weights())
    image = {"type": "image", "image": GOLDEN / "glm_ocr" / "wide.png"}
    text = {"type": "text", "text": "What?"}
    prompt = family.prompt([{"role": "user", "content": [image, text]}])
    assert prompt.layout.image_starts and prompt.ids.max() < family.decoder.vocab_size
    assert config["image_token_id"] == {"glm-ocr": 59280, "glm-4.6v-flash": 151363}.get(
        like, 151343
    )
