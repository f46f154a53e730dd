"""The artifact directory: what is accepted, what is refused in one sentence, and what a killed run
leaves."""

import json
import os
import subprocess
import sys
import time

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_of
from models.checkpoint import Checkpoint
from models.errors import UserError
from runtime.common import files, processes
from runtime.common.errors import ToolkitError
from runtime.common.files import file_entry
from runtime.common.notes import notes_on_stderr
from runtime.vision import artifact, open_session
from runtime.vision.artifact import Manifest
from runtime.vision.source import Source

GOLDEN = paths.GOLDEN / "visualglm"
PROJECTION = "image_encoder.glm_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def original():
    return family_of(GOLDEN), Checkpoint(GOLDEN)


def variant(tmp_path, change=lambda tensors: None, settings=None, pickled=False):
    """The golden checkpoint with changed tensors or config, in a directory of its own."""
    directory = tmp_path / "variant"
    directory.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    config["eva_config"].update(settings or {})
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / "model.safetensors")
    change(tensors)
    if pickled:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")
    return family_of(directory), Checkpoint(directory)


def make(directory, source, **fields):
    """A complete artifact as far as the runtime looks: files of the stated size, and the
    manifest."""
    work = directory / "work"
    work.mkdir(parents=True)
    for name in (artifact.ONNX, artifact.DATA):
        (work / name).write_bytes(name.encode())
    files = {name: file_entry(work / name) for name in (artifact.ONNX, artifact.DATA)}
    manifest = Manifest(source, fields.pop("family", "visualglm"), 17, {}, {}, files, {}, **fields)
    artifact.publish(work, directory, manifest)
    return directory


def test_a_published_artifact_loads(tmp_path, original):
    directory = make(tmp_path / "a", Source(*original).hash)
    manifest = artifact.load(directory)
    assert manifest.status == "onnx verified" and manifest.soc_version is None
    artifact.check_fits(manifest, Source(*original), directory)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
        (lambda d: (d / "manifest.json").write_text('{"source": "x"}'), "not a manifest"),
        (lambda d: (d / "manifest.json").write_text("[1]"), "not a manifest"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "not a manifest"),
        (lambda d: (d / "vision.onnx.data").unlink(), "vision.onnx.data is missing"),
        (lambda d: (d / "vision.onnx").write_bytes(b""), "vision.onnx has 0 bytes"),
    ],
)
def test_a_damaged_artifact_is_refused(tmp_path, damage, says):
    directory = make(tmp_path / "a", "source")
    damage(directory)
    with pytest.raises(ToolkitError, match=says) as error:
        artifact.load(directory)
    assert "python -m convert" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("at", [0, 7, -1])
@pytest.mark.parametrize("name", [artifact.ONNX, artifact.DATA])
def test_a_flipped_bit_is_named_with_the_command_that_mends_it(tmp_path, name, at):
    directory = make(tmp_path / "a", "source")
    artifact.load(directory)
    content = bytearray((directory / name).read_bytes())
    content[at] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(ToolkitError, match=f"{name} is damaged.*python -m convert"):
        artifact.load(directory)


def with_manifest(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "link/.bashrc",
    ".bashrc",
    "notes.txt",
    "weight/../../x",
    "weight/.x",
    "weight/a/b",
    "vision.om/x",
    "visión.om ",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_only_files_that_we_write(tmp_path, name):
    directory = make(tmp_path / "a", "source")
    entry = {"bytes": 1, "sha256": "0"}
    files = json.loads((directory / "manifest.json").read_text())["files"]
    with_manifest(directory, files=files | {name: entry})
    with pytest.raises(ToolkitError, match="not a manifest this version can read"):
        artifact.load(directory)
    with_manifest(directory, files=files, om={"files": {"vision.om": entry, name: entry}})
    with pytest.raises(ToolkitError, match="not a manifest this version can read"):
        artifact.load(directory)


@pytest.mark.parametrize("left_out", [{artifact.ONNX, artifact.DATA}, {artifact.DATA}])
def test_what_a_manifest_leaves_out_is_not_used_unchecked(left_out, tmp_path):
    directory = make(tmp_path / "a", "source")
    files = json.loads((directory / "manifest.json").read_text())["files"]
    with_manifest(directory, files={name: files[name] for name in files.keys() - left_out})
    with pytest.raises(ToolkitError, match="not a manifest this version can read"):
        artifact.load(directory)


@pytest.mark.parametrize("name", ["vision.om", "vision_linux_aarch64.om"])
def test_a_damaged_om_is_named(tmp_path, name):
    directory = make(tmp_path / "a", "source")
    (directory / "weight").mkdir()
    files = {}
    for each in (name, "weight/0f3a"):
        (directory / each).write_bytes(b"compiled")
        files[each] = file_entry(directory / each)
    with_manifest(directory, om={"files": files})
    manifest = artifact.load(directory)
    assert artifact.om_file(manifest, directory) == directory / name
    for each in files:
        (directory / each).write_bytes(b"Compiled")
        with pytest.raises(ToolkitError, match=f"{each} is damaged.*python -m convert"):
            artifact.om_file(manifest, directory)
        (directory / each).write_bytes(b"compiled")


def test_a_pipe_in_an_artifact_is_refused_at_once(tmp_path):
    directory = make(tmp_path / "a", "source")
    for name in (artifact.DATA, "manifest.json"):
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(UserError, match="named pipe"):
            artifact.load(directory)


def test_a_damaged_artifact_in_the_cache_is_made_again(cache, monkeypatch, capsys, original):
    source = Source(*original)
    runs = []
    monkeypatch.setattr(
        artifact,
        "_convert",
        lambda model, directory: runs.append(make(directory / str(len(runs)), source.hash)),
    )
    directory = make(artifact.cache_directory(source), source.hash)
    assert artifact.find_or_convert(source) == directory and not runs
    (directory / artifact.DATA).write_bytes(artifact.DATA.upper().encode())
    with notes_on_stderr():
        artifact.find_or_convert(source)
    assert len(runs) == 1
    assert "vision.onnx.data is damaged" in capsys.readouterr().err


def test_a_missing_directory_and_a_file_are_refused(tmp_path):
    with pytest.raises(ToolkitError, match="does not exist"):
        artifact.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ToolkitError, match="is a file"):
        artifact.load(tmp_path / "file")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"source": "0" * 64}, "made from another checkpoint"),
        ({"family": "glm-4v"}, "holds a glm-4v encoder"),
        ({"exporter": 0}, "written by exporter 0"),
    ],
)
def test_an_artifact_of_something_else_is_refused(tmp_path, original, fields, says):
    source = fields.pop("source", None) or Source(*original).hash
    directory = make(tmp_path / "a", source, **fields)
    with pytest.raises(ToolkitError, match=says):
        artifact.find_or_convert(Source(*original), directory)


def test_a_kill_while_publishing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    directory = make(tmp_path / "a", "old")
    moves = []
    (directory / "work" / artifact.ONNX).write_bytes(b"new")
    real = os.replace

    def die_at_the_second(*paths):
        moves.append(paths)
        if len(moves) == 2:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        artifact.publish(
            directory / "work",
            directory,
            Manifest(
                "new",
                "visualglm",
                17,
                {},
                {},
                {
                    artifact.ONNX: {"bytes": 3, "sha256": ""},
                    artifact.DATA: {"bytes": 0, "sha256": ""},
                },
                {},
            ),
        )
    with pytest.raises(ToolkitError, match="no manifest.json"):
        artifact.load(directory)


def test_source_hash_follows_content_not_packing(tmp_path, original):
    assert Source(*variant(tmp_path, pickled=True)).hash == Source(*original).hash


def test_source_hash_ignores_the_language_model(tmp_path, original):
    other = variant(tmp_path, lambda tensors: tensors["lm_head.weight"].zero_())
    assert Source(*other).hash == Source(*original).hash


@pytest.mark.parametrize(
    "change",
    [
        {"change": lambda tensors: tensors[PROJECTION].view(-1)[0].add_(1)},
        {"settings": {"layernorm_epsilon": 1e-5}},
        {"settings": {"num_attention_heads": 2}},
    ],
    ids=["tensor", "eps", "heads"],
)
def test_source_hash_sees_every_change_of_the_encoder(tmp_path, original, change):
    assert Source(*variant(tmp_path, **change)).hash != Source(*original).hash


def test_the_digest_is_computed_once_per_state_of_the_files(tmp_path, monkeypatch):
    family, checkpoint = variant(tmp_path)
    read = []
    real = Checkpoint.digest
    monkeypatch.setattr(
        Checkpoint, "digest", lambda self, names: read.append(1) or real(self, names)
    )
    first = Source(family, checkpoint).hash
    assert Source(family, Checkpoint(checkpoint.directory)).hash == first and len(read) == 1
    file = checkpoint.directory / "model.safetensors"
    before = file.stat()
    os.utime(file, (1, 1))
    assert Source(family, checkpoint).hash == first and len(read) == 2
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as it was, but for its ctime
    assert Source(family, checkpoint).hash == first and len(read) == 3


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, original):
    (tmp_path / "file").touch()
    known = Source(*original).hash
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "file"))
    assert Source(*original).hash == known


def test_without_an_artifact_the_cache_is_filled_once(cache, monkeypatch, capsys, original):
    runs = []

    def convert(model, directory):
        runs.append(make(directory, Source(*original).hash))

    monkeypatch.setattr(artifact, "_convert", convert)
    with notes_on_stderr():
        first = artifact.find_or_convert(Source(*original))
        second = artifact.find_or_convert(Source(*original))
    assert first == second == runs[0] and len(runs) == 1 and cache in first.parents
    assert capsys.readouterr().err.count("converting the vision encoder once") == 1


def test_a_failed_conversion_is_one_sentence(monkeypatch, original, tmp_path):
    monkeypatch.setattr(
        artifact, "start_module", lambda *arguments, **options: subprocess.Popen(["false"])
    )
    with pytest.raises(ToolkitError, match="conversion of .* failed") as error:
        artifact.find_or_convert(Source(*original))
    assert error.value.exit_code == 1


def test_a_second_converter_waits_for_the_first(tmp_path, capsys):
    code = (
        "import sys, time; from pathlib import Path; from runtime.common.files import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(0.5); Path(sys.argv[1], 'done').touch()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=processes.ROOT, stdout=subprocess.PIPE
    ) as first:
        first.stdout.readline()
        start = time.perf_counter()
        with notes_on_stderr(), files.locked(tmp_path):
            assert (tmp_path / "done").exists() and time.perf_counter() - start < 30
    assert "another conversion" in capsys.readouterr().err


@pytest.mark.parametrize("kind, machine", [("auto", "TorchVision"), ("onnx", None)])
def test_a_torch_that_does_not_export(original, monkeypatch, capsys, kind, machine):
    """auto runs the encoder in torch and says so; what the user asked for is refused."""
    monkeypatch.setattr(torch, "__version__", "2.9.0+cpu")
    if machine is None:
        with pytest.raises(ToolkitError, match="exported with torch 2.13, here is 2.9.0") as caught:
            open_session(kind, *original)
        assert caught.value.exit_code == 3
        return
    with notes_on_stderr():
        assert type(open_session(kind, *original)).__name__ == machine
    assert "this torch does not export encoders" in capsys.readouterr().err
