"""Conversion: from the tiny VisualGLM checkpoint to a verified artifact, and everything that must stop it."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import pipeline
from convert.__main__ import main
from convert.verify import pieces, streamed_tower
from convert.verify.comparison import Comparison, compare
from convert.verify.images import verification_images, verification_pictures
from convert.verify.preflight import preflight
from convert.verify.streamed_graph import StreamedGraph
from convert.verify.streamed_tower import StreamedTower
from convert.verify.verification import measure
from models import family_of
from models.checkpoint import Checkpoint
from runtime.bench.__main__ import main as bench
from runtime.chat import main as chat
from runtime.common.errors import ToolkitError, run_command
from runtime.predict.__main__ import main as predict
from runtime.vision import artifact, open_session
from runtime.vision.onnx_session import OnnxVision
from runtime.vision.source import Source
from runtime.vision.torch_session import TorchVision, plain_tower

GOLDEN = paths.GOLDEN / "visualglm"


def convert(model, out, *more) -> tuple[int, str]:
    """(exit code, everything printed) of `python -m convert`, run in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_command(main, ["--model", str(model), "--out", str(out), *more])
    return code, printed.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(
            "convert.atc.run.find_atc", lambda: None
        )  # tests/convert/test_atc_command.py has the rest
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    code, text = convert(GOLDEN, out, "--soc_version", "Ascend310P3")
    assert code == 0, text
    return out, text


@pytest.fixture
def quick(monkeypatch, converted):
    """Conversions without tracing (the graph of `converted` is taken) and with verification in this process."""
    graph = (converted[0] / artifact.ONNX).read_bytes()

    def copied(model, family, checkpoint, onnx_dir):
        (onnx_dir / artifact.ONNX).write_bytes(graph)
        shutil.copy(converted[0] / artifact.DATA, onnx_dir)
        return artifact.load(converted[0]).files

    monkeypatch.setattr(pipeline, "trace", lambda build, spec: None)
    monkeypatch.setattr(pipeline, "write_onnx", copied)
    monkeypatch.setattr(
        pipeline, "verify", lambda family, onnx_dir: measure(family.directory, onnx_dir)
    )
    return monkeypatch


def state(directory: Path) -> dict:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


# the artifact


def test_the_exported_model(converted):
    out, _ = converted
    model = onnx.load(out / "vision.onnx")
    tower = family_of(GOLDEN).vision_encoder()
    names = {tensor.name for tensor in model.graph.initializer}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {name for name, _ in tower.named_parameters()} <= names
    assert not {"Slice", "Squeeze", "Split", "Gather", "Shape", "Cast"} & {
        node.op_type for node in model.graph.node
    }
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert "vit.blocks.2.attention.q/MatMul" in {node.name for node in model.graph.node}
    assert preflight(out / "vision.onnx", family_of(GOLDEN).vision, 17)[0] == []


def test_the_manifest(converted):
    out, _ = converted
    manifest = artifact.load(out)
    assert manifest.input == {"name": "input", "shape": [1, 224, 224, 3], "dtype": "float32"}
    assert manifest.output == {"name": "output", "shape": [1, 32, 64], "dtype": "float32"}
    assert manifest.errors.keys() == {"scene", "noise"} and all(
        e["cosine"] > 0.99999 for e in manifest.errors.values()
    )
    for name, entry in manifest.files.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]
    assert set(state(out)) == {
        "vision.onnx",
        "vision.onnx.data",
        "manifest.json",
        "atc.sh",
        "vision_mixlist.json",
        ".lock",
    }


def test_the_atc_command(converted):
    out, text = converted
    script = (out / "atc.sh").read_text()
    for part in (
        "--model=../vision.onnx",
        "--framework=5",
        "--output=vision",
        "--soc_version=Ascend310P3",
        "--input_shape=input:1,224,224,3",
        "--precision_mode_v2=fp16",
    ):
        assert part in script and part in text
    assert text.strip().splitlines()[0].startswith("writing ") and "ONNX verified" in text


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_features_equal_the_original_implementation(converted, kind):
    golden = np.load(GOLDEN / "golden.npz")
    session = open_session(kind, family_of(GOLDEN), Checkpoint(GOLDEN), converted[0])
    pixels = golden["nhwc_input"].astype(np.float32)
    features = session.encode(np.concatenate([pixels, pixels]))
    np.testing.assert_allclose(features, np.repeat(golden["image_embeds"], 2, axis=0), atol=1e-4)
    assert session.describe().startswith("vision: ")


def inputs_of(family) -> list[dict]:
    """The encoder's inputs for the verification images."""
    return [family.encoder_inputs([picture]) for picture in verification_pictures(family).values()]


def test_verification_in_pieces_computes_the_same(converted):
    family = family_of(GOLDEN)
    checkpoint = Checkpoint(GOLDEN)
    inputs = inputs_of(family)
    tower = StreamedTower(family, checkpoint)
    plain = plain_tower(family, checkpoint, torch.float32)
    whole = np.concatenate([plain(torch.from_numpy(each["input"])).numpy() for each in inputs])
    np.testing.assert_array_equal(np.concatenate([tower.run(each) for each in inputs]), whole)
    assert all(p.is_meta for name, p in tower.tower.named_parameters() if ".blocks." in name), (
        "weights are given back"
    )
    graph = StreamedGraph(converted[0], limit=50_000)
    assert graph.steps > 4 and StreamedGraph(converted[0]).steps == 1
    cut_up = np.concatenate(graph.run(inputs))
    assert not (converted[0] / "piece.onnx").exists()
    np.testing.assert_allclose(
        cut_up, np.concatenate(StreamedGraph(converted[0]).run(inputs)), atol=1e-5
    )
    np.testing.assert_allclose(cut_up, whole, atol=1e-5)


def test_a_large_attention_is_computed_for_some_queries_at_a_time(converted, monkeypatch):
    """What a tower of 6401 patches needs: its scores alone would take 2.6 GB, on both sides."""
    family = family_of(GOLDEN)
    inputs = inputs_of(family)
    whole = np.concatenate(StreamedGraph(converted[0]).run(inputs))
    reference = np.concatenate(
        [StreamedTower(family, Checkpoint(GOLDEN)).run(each) for each in inputs]
    )
    planned = pieces.memory_needed(StreamedGraph(converted[0]).model.graph)
    monkeypatch.setattr(pieces, "SCORE_BYTES", 1000)
    monkeypatch.setattr(streamed_tower, "SCORE_BYTES", 1000)
    graph = StreamedGraph(converted[0])
    attentions = [piece for piece in graph.pieces if piece.queries]
    assert attentions and all(
        [node.op_type for node in piece.nodes] == ["MatMul", "Softmax", "MatMul"]
        for piece in attentions
    )
    assert pieces.memory_needed(graph.model.graph) < planned
    rows = []
    softmax = torch.softmax
    monkeypatch.setattr(
        torch, "softmax", lambda x, dim: rows.append(x.shape[-2]) or softmax(x, dim)
    )
    tower = StreamedTower(family, Checkpoint(GOLDEN))
    np.testing.assert_allclose(np.concatenate(graph.run(inputs)), whole, atol=1e-5)
    found = np.concatenate([tower.run(each) for each in inputs])
    np.testing.assert_allclose(found, reference, atol=1e-5)
    assert max(rows) < family.vision.rows
    softmaxes = [node for node in graph.model.graph.node if node.op_type == "Softmax"]
    inner = [softmaxes[0].output[0], softmaxes[0].input[0]]
    values = dict(graph.values(inputs[0], inner))
    np.testing.assert_allclose(values[inner[0]].sum(-1), 1, atol=1e-5)
    assert values[inner[0]].shape == values[inner[1]].shape


class FadingSession(onnxruntime.InferenceSession):
    """As ONNX Runtime 1.23 can be: what a session gave is worth nothing once it runs again, and it
    gives an output that is an input back as it came."""

    given: list[np.ndarray] = []

    def run(self, names, inputs):
        assert not set(names).intersection(inputs), "asked for what only passes through"
        values = super().run(names, inputs)
        for value in self.given:
            value.fill(np.nan)
        FadingSession.given = [value.copy() for value in values]
        return self.given


def test_pieces_keep_no_memory_of_the_runtime(converted, monkeypatch):
    inputs = inputs_of(family_of(GOLDEN))
    graph = StreamedGraph(converted[0], limit=50_000)
    through = [name for piece in graph.pieces for name in piece.outputs if name in piece.inputs]
    assert through, "no value crosses two cuts: the case is not there"
    wanted = np.concatenate(graph.run(inputs))
    monkeypatch.setattr(onnxruntime, "InferenceSession", FadingSession)
    np.testing.assert_array_equal(np.concatenate(graph.run(inputs)), wanted)
    named = dict(graph.values(inputs[0], [through[0], graph.model.graph.output[0].name]))
    assert len(named) == 2 and all(np.isfinite(value).all() for value in named.values())


# again, and again after a kill


def test_a_second_run_changes_nothing(converted):
    before = state(converted[0])
    code, text = convert(GOLDEN, converted[0], "--soc-version", "Ascend310P3")
    assert code == 0 and "nothing to do" in text and state(converted[0]) == before


def test_a_run_killed_after_the_export_is_continued(quick, converted, tmp_path):
    with quick.context() as patch:
        patch.setattr(
            pipeline, "verify", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert convert(GOLDEN, tmp_path)[0] == 130
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "vision.onnx").exists()
    quick.setattr(pipeline, "write_onnx", None)
    code, text = convert(GOLDEN, tmp_path, "--soc-version", "Ascend310P3")
    assert (
        code == 0
        and "continuing after the export" in text
        and state(tmp_path) == state(converted[0])
    )


def test_what_a_run_killed_in_the_export_left_is_thrown_away(quick, converted, tmp_path):
    (tmp_path / pipeline.WORK).mkdir()
    (tmp_path / pipeline.WORK / "vision.onnx.data").write_bytes(b"half")
    assert convert(GOLDEN, tmp_path, "--soc-version", "Ascend310P3")[0] == 0
    assert state(tmp_path) == state(converted[0])


def test_an_interrupted_export_leaves_nothing(quick, tmp_path):
    quick.setattr(
        pipeline, "write_onnx", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert convert(GOLDEN, tmp_path)[0] == 130
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_damaged_artifact_is_made_again(quick, converted, tmp_path):
    assert convert(GOLDEN, tmp_path, "--soc-version", "Ascend310P3")[0] == 0
    (tmp_path / "vision.onnx").write_bytes(b"short")
    assert convert(GOLDEN, tmp_path, "--soc-version", "Ascend310P3")[0] == 0
    assert state(tmp_path) == state(converted[0])


# what must not pass


def test_another_checkpoint_needs_force(quick, converted, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(GOLDEN, other)
    tensors = load_file(other / "model.safetensors")
    tensors["image_encoder.glm_proj.bias"][0] += 1
    save_file(tensors, other / "model.safetensors")
    out = tmp_path / "out"
    assert convert(GOLDEN, out)[0] == 0
    before = state(out)
    code, text = convert(other, out)
    assert code == 2 and "another checkpoint" in text and "--force" in text and state(out) == before
    code, text = convert(
        other, out, "--force"
    )  # `quick` writes the old weights, which verification must notice
    assert code == 1 and "disagree" in text and state(out) == before


def test_a_failed_verification_leaves_nothing_usable(quick, tmp_path):
    quick.setattr(
        pipeline, "verify", lambda *arguments: {"scene": Comparison(0.99, 1.0, 0.1, 2.0, 10)}
    )
    code, text = convert(GOLDEN, tmp_path)
    assert (
        code == 1 and "disagree" in text and [file.name for file in tmp_path.iterdir()] == [".lock"]
    )


def test_nothing_compared_is_a_failure(quick, tmp_path):
    quick.setattr(pipeline, "verify", lambda *arguments: {})
    assert convert(GOLDEN, tmp_path)[0] == 1


@pytest.mark.parametrize(
    "prepare, says",
    [
        (
            lambda path: ["--model", str(path / "nothing"), "--out", str(path / "out")],
            "does not exist",
        ),
        (lambda path: ["--model", str(GOLDEN), "--out", str(GOLDEN / "config.json")], "is a file"),
        (lambda path: ["--model", str(GOLDEN), "--out", "/proc/nothing"], "cannot be written"),
        (
            lambda path: ["--model", str(GOLDEN), "--out", str(path), "--soc-version", "910B3"],
            "npu-smi",
        ),
        (
            lambda path: [
                "--model",
                str(GOLDEN),
                "--out",
                str(path),
                "--soc-version",
                "Ascend910B",
            ],
            "Ascend910B3",
        ),
        (lambda path: ["--out", str(path)], "--model"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, capsys, prepare, says):
    assert run_command(main, prepare(tmp_path)) == 2
    text = capsys.readouterr().err
    assert says in text and text.count("\n") == 1


def test_another_torch_does_not_export(quick, tmp_path):
    quick.setattr(torch, "__version__", "2.9.0+cpu")
    code, text = convert(GOLDEN, tmp_path)
    assert code == 3 and "is exported with torch 2.13, here is 2.9.0+cpu;" in text
    assert "pip install 'torch==2.13.*'" in text and not list(tmp_path.glob("*.onnx"))


def test_a_full_disk_is_noticed_before_anything_is_written(quick, tmp_path):
    quick.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 95, 5))
    code, text = convert(GOLDEN, tmp_path)
    assert (
        code == 2
        and "free some space" in text
        and [file.name for file in tmp_path.iterdir()] == [".lock"]
    )


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path, quick):
    quick.undo()
    quick.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    quick.setattr(pipeline, "trace", lambda build, spec: None)

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    quick.setattr(pipeline, "write_onnx", full)
    code, text = convert(GOLDEN, tmp_path / "out")
    assert (
        code == 2
        and "became full" in text
        and [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    )


# folders of strangers


def interrupted(converted, out, files=None, source=None):
    """An artifact folder as a run leaves it that was killed after the export; its work folder."""
    manifest = artifact.load(converted[0])
    work = out / pipeline.WORK
    work.mkdir(parents=True)
    for name in manifest.files:
        shutil.copy(converted[0] / name, work)
    record = [source or manifest.source, manifest.files | (files or {})]
    (work / pipeline.EXPORTED).write_text(json.dumps(record))
    return work


def test_an_interrupted_run_is_continued(quick, converted, tmp_path):
    interrupted(converted, tmp_path / "out")
    code, text = convert(GOLDEN, tmp_path / "out")
    assert code == 0 and "continuing after the export" in text
    assert not (tmp_path / "out" / pipeline.WORK).exists()


def test_a_record_does_not_write_outside(quick, converted, tmp_path):
    """A stranger's record names link/.bashrc, and OUT/link leads to the home."""
    out = tmp_path / "home" / "artifact"
    (tmp_path / "home").mkdir()
    bashrc = tmp_path / "home" / ".bashrc"
    bashrc.write_text("mine")
    work = interrupted(converted, out, {"link/.bashrc": {"bytes": 6, "sha256": "0"}})
    (work / "link").mkdir()
    (work / "link" / ".bashrc").write_text("theirs")
    (out / "link").symlink_to("..")
    code, text = convert(GOLDEN, out)
    assert code == 0 and "is made again: its record names" in text
    assert bashrc.read_text() == "mine" and "link/.bashrc" not in artifact.load(out).files


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "[1, 2, 3]",
        "{}",
        "null",
        "[" * 100_000,
        '["HASH", []]',
        '["HASH", {"vision.onnx": 1}]',
    ],
)
def test_a_damaged_record_is_exported_again(quick, converted, tmp_path, record):
    work = interrupted(converted, tmp_path / "out")
    text = record.replace("HASH", artifact.load(converted[0]).source)
    (work / pipeline.EXPORTED).write_text(text)
    code, text = convert(GOLDEN, tmp_path / "out")
    assert code == 0 and "is made again" in text


def test_a_damaged_export_is_made_again(quick, converted, tmp_path):
    work = interrupted(converted, tmp_path / "out")
    with open(work / artifact.DATA, "r+b") as stream:
        stream.write(b"\xff")
    code, text = convert(GOLDEN, tmp_path / "out")
    assert code == 0 and "vision.onnx.data is damaged" in text
    artifact.load(tmp_path / "out")


@pytest.mark.parametrize("name", [artifact.DATA, "piece.onnx", pipeline.EXPORTED])
def test_a_link_in_the_work_folder_is_refused(quick, converted, tmp_path, name):
    thesis = tmp_path / "thesis"
    thesis.write_text("the only copy")
    work = interrupted(converted, tmp_path / "out")
    (work / name).unlink(missing_ok=True)
    (work / name).symlink_to(thesis)
    code, text = convert(GOLDEN, tmp_path / "out")
    assert code == 2 and f"{name} is a link" in text and text.count("\n") == 1
    assert thesis.read_text() == "the only copy"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    thesis = tmp_path / "thesis"
    thesis.write_text("the only copy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to("../thesis")
    code, text = convert(GOLDEN, tmp_path / "out")
    assert code == 2 and ".lock is a link" in text and thesis.read_text() == "the only copy"


def test_a_damaged_artifact_is_made_again_and_says_so(quick, converted, tmp_path):
    out = tmp_path / "out"
    assert convert(GOLDEN, out)[0] == 0
    with open(out / artifact.DATA, "r+b") as stream:
        stream.write(b"\xff")
    code, text = convert(GOLDEN, out)
    assert code == 0 and "vision.onnx.data is damaged" in text
    artifact.load(out)


# verification


def test_compare_measures_every_element():
    reference = np.array([[0.0, 1.0, -2.0]])
    result = compare(
        reference, reference + np.array([[1e-4, 0, 0]])
    )  # the error sits on a golden zero
    assert (
        result.max_abs == pytest.approx(1e-4)
        and result.mean_abs == pytest.approx(1e-4 / 3)
        and result.elements == 3
    )
    assert result.passed and not compare(reference, reference + np.array([[3e-4, 0, 0]])).passed


@pytest.mark.parametrize("candidate", [[np.nan, 1.0], [np.inf, 1.0], [2.0, -1.0]])
def test_compare_fails(candidate):
    assert not compare(np.array([1.0, 2.0]), np.array(candidate)).passed


def test_nothing_to_compare_fails():
    assert not compare(np.zeros(0), np.zeros(0)).passed
    with pytest.raises(ToolkitError, match="shapes differ"):
        compare(np.zeros(2), np.zeros(3))


def test_the_pictures_are_always_the_same_and_different():
    first = verification_images()
    second = verification_images()
    assert all(np.array_equal(first[name], second[name]) for name in first) and len(first) == 2
    assert not np.array_equal(first["scene"], first["noise"])


# sessions


def test_sessions_refuse_wrong_pixels_and_nan(converted):
    session = OnnxVision(converted[0], family_of(GOLDEN).vision, threads=1)
    for wrong in (np.zeros((1, 3, 224, 224), np.float32), np.zeros((1, 224, 224, 3), np.uint8)):
        with pytest.raises(ToolkitError, match="it takes float32"):
            session.encode(wrong)
    with pytest.raises(ToolkitError, match="ONNX vision encoder gave NaN"):
        session.encode(np.full((1, 224, 224, 3), np.nan, np.float32))


def test_sessions_take_any_number_of_pictures_and_any_memory_order(converted):
    family = family_of(GOLDEN)
    session = TorchVision(family, Checkpoint(GOLDEN))
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 224, 224, 3)).astype(np.float32)
    together = session.encode(pixels)
    scattered = np.moveaxis(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), -1, 0)[1]
    np.testing.assert_array_equal(session.encode(scattered[None])[0], together[1])
    assert session.encode(pixels[:0]).shape == (0, 32, 64)


def test_an_unreadable_graph_is_one_sentence(tmp_path):
    (tmp_path / "vision.onnx").write_bytes(b"nonsense")
    with pytest.raises(ToolkitError, match="cannot be loaded"):
        OnnxVision(tmp_path, family_of(GOLDEN).vision)


def session_folder(model=GOLDEN):
    """Which artifact a command without --artifact takes."""
    return open_session("onnx", family_of(model), Checkpoint(model)).graph.directory


@pytest.fixture
def no_second_export(monkeypatch):
    def refuse(*given):
        raise AssertionError("a second export")

    monkeypatch.setattr(artifact, "_convert", refuse)


def test_what_was_converted_is_found_by_the_commands(quick, tmp_path, no_second_export):
    quick.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    for out in (tmp_path / "first", tmp_path / "with a blank"):
        assert convert(GOLDEN, out)[0] == 0
        assert session_folder() == out  # the last one


def test_every_command_takes_the_one_export(quick, tmp_path, no_second_export, capfd):
    quick.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    quick.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    assert convert(GOLDEN, tmp_path / "x")[0] == 0
    picture = str(GOLDEN / "image.png")
    asked = ["--model", str(GOLDEN), "--max-tokens", "2", "--temperature", "0"]
    line = json.dumps({"prompt": "hi", "image": "image.png"}) + "\n"
    (tmp_path / "in.jsonl").write_text(line)
    shutil.copy(picture, tmp_path)
    files = ["--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    perf = ["--model", str(GOLDEN), "--perf", "--output-len", "2", "--out", str(tmp_path)]
    assert run_command(chat, [*asked, "--image", picture, "--prompt", "hi"]) == 0
    assert run_command(predict, [*asked, *files]) == 0
    assert run_command(bench, [*perf, "--image", picture]) == 0
    assert "converting the vision encoder once" not in capfd.readouterr().err


def test_a_folder_that_is_no_longer_whole_is_not_taken(quick, tmp_path):
    quick.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    source = Source(family_of(GOLDEN), Checkpoint(GOLDEN))
    made = []
    quick.setattr(artifact, "_convert", lambda model, out: made.append(convert(model, out)))
    assert convert(GOLDEN, tmp_path / "gone")[0] == 0
    (tmp_path / "gone" / artifact.ONNX).unlink()
    assert session_folder() == artifact.cache_directory(source) and len(made) == 1
    assert session_folder() == artifact.cache_directory(source) and len(made) == 1


def test_without_out_the_cache_holds_it(quick, tmp_path, no_second_export, capsys):
    quick.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    assert run_command(main, ["--model", str(GOLDEN)]) == 0
    folder = session_folder()
    assert tmp_path / "cache" in folder.parents and str(folder) in capsys.readouterr().out
    assert run_command(main, ["--model", str(GOLDEN), "--dry-run"]) == 0
    assert str(folder) in capsys.readouterr().out
