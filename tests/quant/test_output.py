"""What `python -m quant` copies beside the weights, and the folder in which it works."""

import json
import os

import pytest
import torch

from models.errors import UserError
from quant.output.files import copy_small_files, small_files
from quant.work_folder import FinishedLayer, ResidualStreams, WorkFolder, store
from runtime.common.files import CHECKSUMS
from runtime.common.notes import notes_on_stderr


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = ("tokenizer.json", "merges.txt", "config.json", "model.safetensors", ".gitattributes")
    for name in (*names, CHECKSUMS):
        (folder / name).write_text(name)
    (folder / "assets").mkdir()
    return folder


def test_small_files_are_copied(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    assert copy_small_files(checkpoint, tmp_path / "out") == ["merges.txt", "tokenizer.json"]
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_to_a_private_file_is_refused_before_anything_is_copied(
    checkpoint, tmp_path, absolute
):
    (tmp_path / "id_ed25519").write_text("PRIVATE KEY")
    (checkpoint / "merges.txt").unlink()
    target = tmp_path / "id_ed25519" if absolute else "../id_ed25519"
    (checkpoint / "merges.txt").symlink_to(target)
    (tmp_path / "out").mkdir()
    for refused in (
        lambda: small_files(checkpoint),
        lambda: copy_small_files(checkpoint, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="merges.txt is a link to .*id_ed25519"):
            refused()
    assert not list((tmp_path / "out").iterdir())


def test_a_pipe_in_a_checkpoint_is_refused_at_once(checkpoint):
    os.mkfifo(checkpoint / "vocab.txt")
    with pytest.raises(UserError, match="vocab.txt is a named pipe"):
        small_files(checkpoint)


def test_a_copy_replaces_a_link_of_the_output_folder(checkpoint, tmp_path):
    (tmp_path / "thesis").write_text("the only copy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merges.txt").symlink_to("../thesis")
    copy_small_files(checkpoint, tmp_path / "out")
    assert (tmp_path / "thesis").read_text() == "the only copy"


def test_layers_are_stored_under_private_names_first(tmp_path):
    (tmp_path / "thesis").write_text("the only copy")
    (tmp_path / "layer.safetensors").symlink_to("thesis")
    store({}, tmp_path / "layer.safetensors")
    assert (tmp_path / "thesis").read_text() == "the only copy"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer.safetensors", "thesis"]


def test_a_work_folder_of_another_job_is_emptied(tmp_path):
    first = WorkFolder(tmp_path / "layers", {"job": 1})
    finished = FinishedLayer({}, {}, 1.0, 50.0)
    first.save_layer(0, {}, {}, finished, ResidualStreams({}, {}))
    assert WorkFolder(tmp_path / "layers", {"job": 1}).num_finished() == 1
    assert WorkFolder(tmp_path / "layers", {"job": 2}).num_finished() == 0
    assert json.loads((tmp_path / "layers" / "job.json").read_text()) == {"job": 2}


@pytest.fixture
def two_layers(tmp_path):
    """The work folder of a run that was killed after its second layer."""
    work = WorkFolder(tmp_path / "layers", {"job": 1})
    for index in range(2):
        streams = ResidualStreams({0: torch.ones(2, 4)}, {0: torch.ones(2, 4)})
        tensors = {"weight": torch.full((4, 4), float(index))}
        work.save_layer(index, tensors, tensors, FinishedLayer({}, {}, 1.0, 50.0), streams)
    return work


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "layer-0001.safetensors": flip_a_bit,
    "layer-0000.float.safetensors": flip_a_bit,
    "streams-0002.safetensors": flip_a_bit,
    "layer-0000.safetensors": lambda file: file.unlink(),
    "layer-0000.json": lambda file: file.write_text("{"),
    "layer-0001.json": lambda file: file.write_text("[" * 100_000),
}


def test_whole_layers_are_continued(two_layers):
    assert two_layers.num_finished() == 2


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_the_work_folder_is_named_and_made_again(two_layers, capsys, name):
    DAMAGE[name](two_layers.folder / name)
    with notes_on_stderr():
        assert two_layers.num_finished() == 0  # the streams before an earlier layer are gone
    said = capsys.readouterr().err
    assert "made again" in said and name in said


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "layer-0007.safetensors"])
def test_a_note_names_its_own_files_only(two_layers, name):
    path = two_layers.folder / "layer-0000.json"
    content = json.loads(path.read_text())
    content["files"][name] = content["files"]["layer-0000.safetensors"]
    path.write_text(json.dumps(content))
    assert two_layers.num_finished() == 0
