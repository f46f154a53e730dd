"""Packed weights in the cache: what is damaged, missing or another model's is packed again, with
one line, and the answer stays the same."""

import json
import os
import shutil

import numpy as np
import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_of
from models.checkpoint import Checkpoint
from models.synthetic.write import write_checkpoint
from runtime import Engine
from runtime.common.files import check_again, checksums
from runtime.common.notes import notes_on_stderr
from runtime.engine.loading import cpu_weights, packed_folder
from runtime.engine.loading.weights import decoder_rows
from runtime.parallel.split import Split

OPTIONS = {"max_model_len": 64, "vision": "torch", "dtype": "float32"}
QKV = "layers.0.qkv.weight.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint("glm-edge-1.5b-chat", folder, scale="tiny", report=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(the cache after packing, logits of the model)."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(cache))
        return cache, logits(model)


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy of the packed weights, in the cache of the test."""
    shutil.copytree(whole[0] / "packed", tmp_path / "cache" / "packed")
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    [folder] = (tmp_path / "cache" / "packed").iterdir()
    return folder


def logits(model) -> np.ndarray:
    engine = Engine(model, cpu_weights="int8", **OPTIONS)
    return engine.prefill_logits(engine.prompt_from_ids([5, 6, 7]))


def flip_a_bit(folder):
    content = bytearray((folder / QKV).read_bytes())
    content[-1] ^= 0x40
    (folder / QKV).write_bytes(content)


def zero_a_half(folder):
    size = (folder / QKV).stat().st_size
    with open(folder / QKV, "r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))


def replace_by_a_link(folder):
    (folder / QKV).rename(folder / "elsewhere")
    (folder / QKV).symlink_to("elsewhere")


def give_other_tensors(change):
    """Damage that is listed as it is: sizes and sha256 fit, the tensors do not."""

    def damage(folder):
        save_file(change(load_file(folder / QKV)), folder / QKV)
        packed_folder.write_list(folder)

    return damage


def list_one_less(folder):
    entries = json.loads((folder / "files.json").read_text())
    del entries[QKV]
    (folder / "files.json").write_text(json.dumps(entries))


DAMAGE = {
    "a flipped bit": (flip_a_bit, "is damaged"),
    "lost blocks": (zero_a_half, "is damaged"),
    "truncated": (lambda folder: os.truncate(folder / QKV, 1000), "has 1,000 bytes"),
    "empty": (lambda folder: os.truncate(folder / QKV, 0), "has 0 bytes"),
    "missing": (lambda folder: (folder / QKV).unlink(), "cannot be used ([Errno 2]"),
    "a pipe": (lambda f: ((f / QKV).unlink(), os.mkfifo(f / QKV)), "named pipe"),
    "a link": (replace_by_a_link, "is a link"),
    "others may write": (lambda folder: (folder / QKV).chmod(0o666), "may be written by others"),
    "no list": (lambda folder: (folder / "files.json").unlink(), "has no files.json"),
    "half a list": (lambda folder: os.truncate(folder / "files.json", 20), "files.json"),
    "a list of others": (list_one_less, "lists other weights"),
    "an unknown form": (give_other_tensors(lambda t: {"int2": t["int8"]}), "other shapes or types"),
    "no scale": (give_other_tensors(lambda t: {"int8": t["int8"]}), "other shapes or types"),
    "five scales": (
        give_other_tensors(lambda t: t | {"scale": t["scale"][:5].clone()}),
        "other shapes or types",
    ),
    "a narrower matrix": (
        give_other_tensors(lambda t: t | {"int8": t["int8"][:, :32].clone()}),
        "other shapes or types",
    ),
    "another type": (
        give_other_tensors(lambda t: t | {"scale": t["scale"].double()}),
        "other shapes or types",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_packed_again(folder, model, whole, capsys, kind):
    damage, says = DAMAGE[kind]
    damage(folder)
    with notes_on_stderr():
        found = logits(model)
    [line] = [each for each in capsys.readouterr().err.splitlines() if "packing" in each]
    assert says in line and str(folder) in line
    np.testing.assert_array_equal(found, whole[1])
    with notes_on_stderr():
        np.testing.assert_array_equal(logits(model), whole[1])
    assert "packing" not in capsys.readouterr().err


def test_every_file_is_read_once_for_its_sha256(folder, model, monkeypatch):
    read = []
    real = checksums.file_entry
    monkeypatch.setattr(checksums, "file_entry", lambda path: read.append(path.name) or real(path))
    logits(model)
    assert sorted(read) == sorted(file.name for file in folder.glob("*.safetensors"))
    logits(model)
    assert len(read) == len(set(read))
    with check_again():
        logits(model)
    assert len(read) == 2 * len(set(read))


def test_every_rank_of_a_split_model_reads_its_own_again(model, tmp_path, monkeypatch):
    """The cache knows the damaged files as checked: only who reads them anew can tell."""
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path))
    wanted = split_logits(model)
    packs = sorted((tmp_path / "packed").iterdir())
    assert len(packs) == 2
    for pack in packs:
        known = checksums.sha256_of(pack / QKV)
        flip_a_bit(pack)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checksums, "file_entry", lambda path, known=known: {"sha256": known})
            checksums.sha256_of(pack / QKV)
    damaged = [(pack / QKV).read_bytes() for pack in packs]
    assert not np.array_equal(split_logits(model), wanted)
    assert [(pack / QKV).read_bytes() for pack in packs] == damaged
    with check_again():
        np.testing.assert_array_equal(split_logits(model), wanted)
    healed = [(pack / QKV).read_bytes() for pack in packs]
    assert all(before != after for before, after in zip(damaged, healed))


def split_logits(model) -> np.ndarray:
    engine = Engine(model, cpu_weights="int8", tensor_parallel_size=2, **OPTIONS)
    try:
        return engine.prefill_logits(engine.prompt_from_ids([5, 6, 7]))
    finally:
        engine.close()


def test_packed_folders_are_private(folder):
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", paths.FAMILIES)
def test_the_layouts_are_what_is_stored(name, kind):
    family = family_of(paths.GOLDEN / name)
    checkpoint = Checkpoint(paths.GOLDEN / name)
    split = Split(family.decoder, 1, 0)
    layouts = cpu_weights.stored_layouts(checkpoint, decoder_rows(family, split), kind)
    names = set()
    for target, tensor in checkpoint.assemble(decoder_rows(family, split)):
        names.add(target)
        stored = cpu_weights._stored(target, tensor, kind)
        for tensor_name, (dtype, shape) in layouts[target].items():
            assert tuple(stored[tensor_name].shape) == shape
            assert dtype in (None, stored[tensor_name].dtype)
        assert set(stored) == set(layouts[target])
    assert names == set(layouts)


def test_layouts_of_int4_know_groups():
    layout = cpu_weights._layout("layers.0.up.weight", (64, 256), "int4")
    assert layout == {
        "int4": (torch.uint8, (64, 128)),
        "scales": (torch.bfloat16, (2, 64, 2)),
    }
