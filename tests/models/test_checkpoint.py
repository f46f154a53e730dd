"""Checkpoint reading: every format gives the same tensors, every problem is one complete message, memory stays low."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.table import Part, Weight
from models.errors import ModelError

GOLDEN = paths.GOLDEN / "visualglm"
EMBED = "transformer.word_embeddings.weight"


@pytest.fixture(scope="module")
def state():
    return load_file(GOLDEN / "model.safetensors")


def halves(state):
    names = sorted(state)
    return [{n: state[n] for n in names[:40]}, {n: state[n] for n in names[40:]}]


def shard(directory, state, suffix, save):
    """Two shards and their index, named as the releases name them."""
    stem, parts = (
        ("model", halves(state)) if suffix == "safetensors" else ("pytorch_model", halves(state))
    )
    files = [f"{stem}-{k:05}-of-00002.{suffix}" for k in (1, 2)]
    for file, part in zip(files, parts):
        save(part, directory / file)
    index = {name: file for file, part in zip(files, parts) for name in part}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return [directory / file for file in files]


def write_sat(state, directory):
    (directory / "latest").write_text("1\n")
    (directory / "1").mkdir()
    torch.save({"module": state, "epoch": 3}, directory / "1" / "mp_rank_00_model_states.pt")


FORMS = {
    "safetensors": lambda s, d: save_file(s, d / "model.safetensors"),
    "sharded safetensors": lambda s, d: shard(d, s, "safetensors", save_file),
    "shards without index": lambda s, d: (
        shard(d, s, "safetensors", save_file),
        (d / "model.safetensors.index.json").unlink(),
    ),
    "bin": lambda s, d: torch.save(s, d / "pytorch_model.bin"),
    "sharded bin": lambda s, d: shard(d, s, "bin", torch.save),
    "old bin": lambda s, d: torch.save(
        s, d / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "sat": write_sat,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_tensors(form, state, tmp_path):
    FORMS[form](state, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.shapes == {name: tuple(value.shape) for name, value in state.items()}
    for name, value in state.items():
        assert checkpoint.dtype(name) == value.dtype and checkpoint.nbytes(name) == value.nbytes
        assert torch.equal(checkpoint.tensor(name), value)
    assert checkpoint.digest(state) == Checkpoint(GOLDEN).digest(state)


def test_digest_sees_names_shapes_dtypes_and_bytes(state, tmp_path):
    known = set()
    value = state[EMBED]
    for k, changed in enumerate((value, value.bfloat16(), value.t().contiguous(), value + 1)):
        (tmp_path / str(k)).mkdir()
        save_file({EMBED: changed}, tmp_path / str(k) / "model.safetensors")
        known.add(Checkpoint(tmp_path / str(k)).digest([EMBED]))
    assert len(known) == 4


def test_safetensors_win_over_bin(state, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint(tmp_path).names == ["a"]


def test_bin_is_read_when_only_the_index_of_the_safetensors_came_along(state, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    )
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint(tmp_path).names == ["b"]


def test_tied_and_transposed_tensors_of_a_bin_get_memory_of_their_own(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared, "c": shared.t()}, tmp_path / "pytorch_model.bin")
    a, b, c = (Checkpoint(tmp_path).tensor(name) for name in "abc")
    a.zero_()
    assert torch.equal(b, shared) and torch.equal(c, shared.t()) and c.is_contiguous()


def refusal(directory) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint(directory)
    return str(caught.value)


def test_all_damaged_shards_are_reported_at_once(state, tmp_path):
    first, second = shard(tmp_path, state, "safetensors", save_file)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1000])
    message = refusal(tmp_path)
    assert f"{first.name} is missing (40 tensors)" in message
    assert f"{second.name} is truncated" in message
    assert message.endswith(f"download again: {first.name}, {second.name}")


def test_missing_shard_without_index_is_seen_from_the_names(state, tmp_path):
    first, _ = shard(tmp_path, state, "safetensors", save_file)
    (tmp_path / "model.safetensors.index.json").unlink()
    first.unlink()
    assert f"{first.name} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_file(file, keep, state, tmp_path):
    FORMS["safetensors" if file.startswith("model") else "bin"](state, tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:keep])
    assert f"{file} is truncated" in refusal(tmp_path)


def test_truncated_old_bin(state, tmp_path):
    FORMS["old bin"](state, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    assert "truncated" in refusal(tmp_path)


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    assert "Git LFS pointer" in refusal(tmp_path)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    assert "never run" in refusal(tmp_path)
    assert not Path("evil").exists()


def test_index_and_shards_disagree(state, tmp_path):
    shard(tmp_path, state, "safetensors", save_file)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    index["ghost.weight"] = index.pop(EMBED)
    path.write_text(json.dumps({"weight_map": index}))
    message = refusal(tmp_path)
    assert "ghost.weight" in message and EMBED in message


def test_the_same_name_in_two_files(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"x.weight": torch.ones(2)}, tmp_path / file)
    assert "in b.safetensors and in another file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda d: d.rmdir(), "does not exist"),
        (lambda d: (d.rmdir(), d.write_text("x")), "is a file"),
        (lambda d: None, "holds no weights"),
        (lambda d: (d / "model.safetensors").mkdir(), "is a folder, not a weight file"),
        (lambda d: (d / "model.safetensors").write_bytes(bytes(100)), "damaged header"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "JSON object"),
        (lambda d: (d / "latest").write_text("7"), "mp_rank_00_model_states.pt is missing"),
    ],
)
def test_unusable_directories(make, words, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    make(directory)
    assert words in refusal(directory)


def test_check_lists_everything_at_once(state, tmp_path):
    changed = {**state, "extra.bias": torch.ones(2), EMBED: state[EMBED][:-1].contiguous()}
    for layer in range(2):
        del changed[f"transformer.layers.{layer}.mlp.dense_4h_to_h.bias"]
        del changed[
            f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"
        ]  # known and not needed
    save_file(changed, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path).check(family_of(tmp_path).weights())
    message = str(caught.value)
    assert (
        "2 tensors missing:" in message
        and "transformer.layers.*.mlp.dense_4h_to_h.bias (2x" in message
    )
    assert "1 tensor unknown:" in message and "extra.bias" in message
    assert "1 tensor of wrong shape:" in message and "[479, 64], expected [480, 64]" in message
    assert "inv_freq" not in message


def test_golden_checkpoint_fits_its_table():
    Checkpoint(GOLDEN).check(family_of(GOLDEN).weights())


@pytest.fixture
def small(tmp_path):
    torch.manual_seed(0)
    state = {name: torch.randn(4, 3).half() for name in ("q", "k", "v", "norm")}
    state["ids"] = torch.arange(4)
    save_file(state, tmp_path / "model.safetensors")
    return state, Checkpoint(tmp_path)


def test_assemble_joins_splits_and_transforms(small):
    state, checkpoint = small
    table = [
        Weight(
            n,
            (4, 3),
            (Part("x.qkv", at=(4 * k, 12)), Part(f"y.{n}", take=(1, 3), transform=torch.t)),
        )
        for k, n in enumerate("qkv")
    ] + [
        Weight("norm", (4, 3)),
        Weight("ids", (4,), (Part("x.ids"),)),
        Weight("absent", (1,), (Part("x.absent"),), optional=True),
    ]
    seen = []
    got = dict(
        checkpoint.assemble(
            table, dtype=torch.bfloat16, progress=lambda *counts: seen.append(counts)
        )
    )
    assert sorted(got) == ["x.ids", "x.qkv", "y.k", "y.q", "y.v"]
    assert torch.equal(got["x.qkv"], torch.cat([state[n] for n in "qkv"]).bfloat16())
    assert torch.equal(got["y.k"], state["k"][1:3].t().bfloat16())
    assert torch.equal(got["x.ids"], state["ids"])  # integers keep their type
    assert all(tensor.is_contiguous() for tensor in got.values())
    assert seen[-1] == (3 * 24 + 32, 3 * 24 + 32)
    assert sorted(dict(checkpoint.assemble(table, prefix="y."))) == ["y.k", "y.q", "y.v"]


def test_assemble_refuses_half_a_target(small):
    table = [
        Weight("q", (4, 3), (Part("x.qkv", at=(0, 8)),)),
        Weight("absent", (4, 3), (Part("x.qkv", at=(4, 8)),), optional=True),
    ]
    with pytest.raises(ModelError, match="only some pieces"):
        dict(small[1].assemble(table))


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.bfloat16), (torch.float32, torch.float16)]
)
def test_conversion_rounds_once(dtypes, tmp_path):
    """Blocks through fp32 give what torch's own conversion gives, in matrices larger than one block too."""
    value = torch.randn(3000, 257, generator=torch.Generator().manual_seed(1)).to(dtypes[0])
    save_file({"a": value}, tmp_path / "model.safetensors")
    got = dict(
        Checkpoint(tmp_path).assemble([Weight("a", (3000, 257), (Part("a"),))], dtype=dtypes[1])
    )
    assert torch.equal(got["a"], value.to(dtypes[1]))


PEAK = """
import re, sys, torch
import models.checkpoint.shards
from models.checkpoint.table import Part, Weight
from models.checkpoint import Checkpoint
models.checkpoint.shards.REOPEN_BYTES = 32 << 20
def peak():         # not getrusage: that one starts with the parent's peak
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
checkpoint = Checkpoint(sys.argv[1])
table = [Weight(n, s, (Part(n),)) for n, s in checkpoint.shapes.items()]
before = peak()
kept = dict(checkpoint.assemble(table, dtype=torch.bfloat16))
print(peak() - before, sum(t.nbytes for t in kept.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_peak_memory_is_targets_and_one_source(form, tmp_path):
    """Targets and file take 192 MB each; the file must never be resident as a whole, mapped or copied."""
    FORMS[form](
        {f"layer{k}": torch.ones(2048, 4096, dtype=torch.float16) for k in range(12)}, tmp_path
    )
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    extra, targets = map(int, output.stdout.split())
    assert targets == 192 << 20
    assert extra < 2 * targets


OUTSIDE = ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".hidden", "a\0b", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_beside_it_only(tmp_path, state, name):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file(state, place / "model.safetensors")
    index = {"weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model.safetensors.index.json names .*no file beside it"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["../other", "/etc", ".hidden", "1/2"])
def test_latest_names_a_folder_beside_it_only(tmp_path, state, name):
    (tmp_path / "latest").write_text(name)
    with pytest.raises(ModelError, match="latest names .*no file beside it"):
        Checkpoint(tmp_path)


def test_weights_of_whole_numbers_are_refused():
    """They were taken as they are: another answer, or an error of torch."""
    checkpoint = Checkpoint(paths.GOLDEN / "glm_edge")
    rows = list(family_of(paths.GOLDEN / "glm_edge").weights())
    norm = next(row.source for row in rows if row.source.endswith("norm.weight"))
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64):
        checkpoint._entries[norm] = replace(checkpoint._entries[norm], dtype=dtype)
        with pytest.raises(
            ModelError, match=f"1 tensor of wrong type:\n.*{dtype}, expected a float"
        ):
            checkpoint.check(rows)


def test_a_bin_of_parameters(tmp_path):
    """Some are saved with their gradient switched on; a tensor without data is missing."""
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    torch.save({"a": parameter, "b": torch.empty(2, device="meta")}, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == ["a"]
    assert not checkpoint.tensor("a").requires_grad


def test_a_compressed_bin_is_not_unpacked(tmp_path):
    """torch stores what it writes; a few MB of a stranger's would fill the memory."""
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as stored,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in stored.infolist():
            packed.writestr(record.filename, stored.read(record))
    assert "pytorch_model.bin is compressed, as torch writes no weights" in refusal(tmp_path)
