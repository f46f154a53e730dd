"""OM vision over stand-ins for three generations of ais_bench and aclruntime (tests/ascend): an .om
here is an ONNX file."""

import contextlib
import gc
import hashlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import paths
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import family_of
from models.checkpoint import Checkpoint
from models.config import VisionSpec
from models.family import Prompt
from runtime import chat
from runtime.ascend.aclruntime import OmModel
from runtime.ascend.host import Host, install_ais_bench
from runtime.common.errors import ToolkitError, run_command
from runtime.common.files import file_entry
from runtime.common.notes import notes_on_stderr
from runtime.compare import __main__ as compare
from runtime.engine.engine import Engine
from runtime.engine.image_features import ImageFeatures
from runtime.engine.loading import build
from runtime.vision import artifact, om_file, open_session
from runtime.vision.om_file import check_chip, find_om
from runtime.vision.om_session import OmVision
from runtime.vision.source import Source

HERE = paths.TESTS
ROOT = paths.ROOT
GOLDEN = paths.GOLDEN / "visualglm"
GENERATIONS = ("2023", "2024", "2026")
SPEC = VisionSpec((1, 8, 8, 3), (1, 4, 6))
TYPES = {
    np.float32: TensorProto.FLOAT,
    np.float16: TensorProto.FLOAT16,
    np.uint8: TensorProto.UINT8,
    np.int64: TensorProto.INT64,
}
WEIGHT = (np.random.default_rng(0).standard_normal((48, 6)) / 100).astype(np.float32)


def expected(pixels):
    return pixels.reshape(-1, 4, 48) @ WEIGHT


def images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3)).astype(np.float32)


def om(
    path,
    batch=1,
    gears="",
    takes=np.float32,
    gives=np.float32,
    shape=(8, 8, 3),
    scale=1.0,
    outputs=("output",),
):
    """An "encoder" of one matmul, [batch, 8, 8, 3] -> [batch, 4, 6]."""
    nodes = [
        helper.make_node("Cast", ["input"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["x", "rows"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
        *(helper.make_node("Cast", ["y"], [name], to=TYPES[gives]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TYPES[takes], [batch, *shape])],
        [helper.make_tensor_value_info(name, TYPES[gives], [batch, 4, 6]) for name in outputs],
        [
            numpy_helper.from_array(np.array([-1, 4, 48]), "rows"),
            numpy_helper.from_array(WEIGHT * np.float32(scale), "w"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if gears:
        helper.set_model_props(model, {"dynamic_batch_size": gears})
    onnx.save(model, path)
    return path


def forget():
    for name in [
        n
        for n in sys.modules
        if n.split(".")[0] in ("aclruntime", "ais_bench", "stand_in_aclruntime")
    ]:
        del sys.modules[name]


@pytest.fixture(params=GENERATIONS)
def acl(request, monkeypatch):
    """The stand-in of one generation; every model it loaded must be unloaded at the end."""
    monkeypatch.syspath_prepend(HERE / "ascend")
    monkeypatch.syspath_prepend(HERE / "ascend" / request.param)
    forget()
    import stand_in_aclruntime

    yield stand_in_aclruntime
    assert stand_in_aclruntime.LOADED == []
    forget()


@pytest.fixture
def opened(acl, tmp_path):
    """open(batch=..., ...) -> OmVision of such a file, closed at the end."""
    sessions = []

    def make(device=0, **settings):
        sessions.append(OmVision(om(tmp_path / f"{len(sessions)}.om", **settings), SPEC, device))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


# values


@pytest.mark.parametrize(
    ("takes", "gives", "error"),
    [
        (np.float32, np.float32, 1e-4),
        (np.float16, np.float16, 0.02),
        (np.uint8, np.float16, 0.02),
        (np.float16, np.float32, 1e-4),
    ],
)
def test_a_static_om_encodes_one_by_one(opened, takes, gives, error):
    session = opened(takes=takes, gives=gives)
    features = session.encode(images(3))
    np.testing.assert_allclose(features, expected(images(3)), atol=error)
    assert features.dtype == np.float32 and session.npu_seconds > 0
    assert f"{np.dtype(takes)} in, {np.dtype(gives)} out" in session.describe()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11])
def test_the_smallest_gear_that_holds_the_images(opened, count):
    session = opened(batch="n", gears="1,2,4", takes=np.float16, gives=np.float16)
    runs = []
    run = session.model.run
    session.model.run = lambda array: runs.append(len(array)) or run(array)
    assert session.model.gears == (1, 2, 4) and "gears 1, 2, 4" in session.describe()
    np.testing.assert_allclose(session.encode(images(count)), expected(images(count)), atol=0.02)
    assert runs == {1: [1], 2: [2], 3: [4], 4: [4], 5: [4, 1], 11: [4, 4, 4]}[count]


def test_a_static_om_of_several_is_filled_up(opened):
    session = opened(batch=4)
    np.testing.assert_allclose(session.encode(images(6)), expected(images(6)), atol=1e-4)


def test_the_output_is_found_by_its_onnx_name(opened):
    np.testing.assert_allclose(
        opened(outputs=("other", "output")).encode(images(1)), expected(images(1)), atol=1e-4
    )
    with pytest.raises(ToolkitError, match="outputs node:0:a, node:1:b, none of them is 'output'"):
        opened(outputs=("a", "b"))


# the library checks bytes only: what we refuse before it


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.astype(np.float32), "takes float16 .*got float32"),
        (lambda a: a.view(np.int16), "takes float16 .*got int16"),  # the same bytes
        (
            lambda a: a.reshape(1, 3, 8, 8),
            r"takes float16 \[1, 8, 8, 3\], got float16 \[1, 3, 8, 8\]",
        ),
        (lambda a: np.repeat(a, 2, 0), r"got float16 \[2, 8, 8, 3\]"),
        (lambda a: a[0], r"got float16 \[8, 8, 3\]"),
        (lambda a: a.transpose(0, 2, 1, 3), "not contiguous"),
    ],
)
def test_a_wrong_array_is_refused_before_the_call(opened, change, reason):
    model = opened(takes=np.float16).model
    with pytest.raises(ToolkitError, match=reason):
        model.run(change(images(1).astype(np.float16)))


def test_a_batch_without_a_gear_is_refused(opened):
    model = opened(batch="n", gears="1,4").model
    with pytest.raises(ToolkitError, match="no gear for a batch of 3; it has 1, 4"):
        model.run(images(3))


def test_a_size_that_the_library_would_refuse(opened):
    model = opened(takes=np.float16).model
    model._session.get_inputs()[0].realsize = 512  # e.g. of an OM with dynamic AIPP
    with pytest.raises(ToolkitError, match="it wants 512 bytes, 384 were given"):
        model.run(images(1).astype(np.float16))


def test_pictures_of_any_strides_are_read_right(opened):
    swapped = images(2).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(
        opened().encode(swapped), expected(np.ascontiguousarray(swapped)), atol=1e-4
    )


def test_pixels_that_the_type_cannot_hold(opened):
    with pytest.raises(ToolkitError, match="takes uint8, which cannot hold these pixels"):
        opened(takes=np.uint8).encode(images(1) + 0.5)


@pytest.mark.parametrize("saturates", [False, True])
def test_an_overflow_is_not_a_feature(opened, saturates):
    """ONNX Runtime gives Inf. aclruntime lets the NPU saturate to the largest half; both must be
    seen."""
    session = opened(takes=np.float16, gives=np.float16, scale=1e4)
    run = session.model.run
    if saturates:
        session.model.run = lambda array: np.clip(run(array), -65504, 65504)
    with pytest.raises(ToolkitError, match="NaN or Inf"):
        session.encode(images(1))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"shape": (3, 8, 8)}, r"input shape \[1, 3, 8, 8\], this model needs \[batch, 8, 8, 3\]"),
        ({"shape": (8, 8, "w")}, "inputs of changing size"),
        ({"batch": "n"}, "accepts no batch size; convert it with --dynamic_batch_size"),
        ({"takes": np.int64}, "data type 9.*--output_type=FP16"),
    ],
)
def test_an_om_of_another_interface(opened, settings, reason):
    with pytest.raises(ToolkitError, match=reason):
        opened(**settings)


# files, devices, threads, memory


def test_what_is_no_om(acl, tmp_path):
    (tmp_path / "text.om").write_text("not a model")
    with pytest.raises(
        ToolkitError,
        match="cannot be loaded on npu:0 .*load model from file failed.*runtime.doctor",
    ):
        OmVision(tmp_path / "text.om", SPEC)
    with pytest.raises(ToolkitError, match="does not exist; give an .om file"):
        OmVision(tmp_path / "none.om", SPEC)
    with pytest.raises(ToolkitError, match="is a folder"):
        OmVision(tmp_path, SPEC)


def test_the_device(acl, opened):
    assert "on npu:1" in opened(device=1).describe() and acl.OPENED == [1]
    with pytest.raises(ToolkitError, match="npu:9 .*acl open device 9 failed"):
        opened(device=9)


def test_contexts_do_not_meet(acl, opened):
    """torch_npu's context in our thread stays, whatever aclruntime does; and the other way
    round."""
    acl.current.context = "torch_npu"
    session = opened()
    session.encode(images(1))
    acl.current.context = "torch_npu again"
    session.encode(images(1))
    assert acl.current.context == "torch_npu again"


def test_nothing_of_the_library_reaches_stdout(opened, capfd):
    opened(batch="n", gears="2,3").encode(images(1))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("redirect", [">&-", "<&- >&-", "2>&1 | cat"])
def test_any_stdout(redirect, tmp_path):
    code = "import sys; from runtime.ascend.aclruntime import OmModel; sys.stderr.write(str(OmModel(sys.argv[1]).gears))"
    path = os.pathsep.join(map(str, (HERE / "ascend" / "2024", HERE / "ascend")))
    done = subprocess.run(
        [
            "bash",
            "-o",
            "pipefail",
            "-c",
            f'"$@" {redirect}',
            "bash",
            sys.executable,
            "-c",
            code,
            str(om(tmp_path / "a.om")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "(1,)")


@pytest.mark.parametrize("shared", [False, True])
def test_release(acl, tmp_path, monkeypatch, shared, request):
    """Closing unloads; with torch_npu in the process the context, which may be torch_npu's, is left
    alone."""
    if shared:
        monkeypatch.setitem(sys.modules, "torch_npu", object())
    session = OmVision(om(tmp_path / "a.om"), SPEC)
    assert len(acl.LOADED) == 1
    session.close()
    session.close()
    with pytest.raises(ToolkitError, match="it was closed"):
        session.encode(images(1))
    knows_how = "2023" not in request.node.name
    assert acl.LOADED == [] and len(acl.FREED) == (knows_how and not shared)


def test_release_without_a_word(acl, tmp_path):
    session = OmVision(om(tmp_path / "a.om"), SPEC)
    assert len(acl.LOADED) == 1
    del session
    assert acl.LOADED == []


def run(code, generation, *arguments):
    path = os.pathsep.join(map(str, (HERE / "ascend" / generation, HERE / "ascend")))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_release_at_exit(generation, tmp_path):
    code = (
        "import atexit, sys, stand_in_aclruntime as acl; atexit.register(lambda: print('loaded', acl.LOADED))\n"
        "from runtime.ascend.aclruntime import OmModel; model = OmModel(sys.argv[1]); print(len(acl.LOADED))"
    )
    done = run(code, generation, om(tmp_path / "a.om"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\nloaded []\n", "")


# which .om


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in GOLDEN.iterdir():
        (folder / file.name).symlink_to(file)
    return Checkpoint(folder)


def manifest(folder, checkpoint, status, source=None, bytes=2, soc=None):
    """An artifact folder with an OM whose contents do not matter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vision.om").write_bytes(b"om")
    entry = {"bytes": bytes, "sha256": hashlib.sha256(b"om").hexdigest()}
    family = family_of(checkpoint.directory)
    for name in (artifact.ONNX, artifact.DATA):
        (folder / name).write_bytes(b"onnx")
    record = artifact.Manifest(
        source or Source(family, checkpoint).hash,
        family.name,
        17,
        {},
        {},
        {name: file_entry(folder / name) for name in (artifact.ONNX, artifact.DATA)},
        {},
        status=status,
        soc_version=soc,
        om={"files": {"vision.om": entry}},
    )
    artifact.publish(folder, folder, record)
    return folder


def test_which_om_is_taken(checkpoint, tmp_path):
    family = family_of(checkpoint.directory)
    assert find_om(Source(family, checkpoint)) is None
    (checkpoint.directory / "blip2.om").touch()
    found = find_om(Source(family, checkpoint))
    assert found.path.name == "blip2.om" and not found.verified
    (checkpoint.directory / "other.om").touch()
    assert find_om(Source(family, checkpoint)).path.name == "blip2.om"  # the guide's, of several
    cached = artifact.cache_directory(Source(family, checkpoint))
    manifest(cached, checkpoint, artifact.OM_VERIFIED)
    assert (
        find_om(Source(family, checkpoint)).path == cached / "vision.om"
        and find_om(Source(family, checkpoint)).verified
    )
    given = manifest(tmp_path / "given", checkpoint, artifact.ONNX_VERIFIED)
    assert find_om(Source(family, checkpoint), given).path == given / "vision.om"
    assert find_om(Source(family, checkpoint), given / "vision.om").path == given / "vision.om"


@pytest.mark.parametrize("status", [artifact.ONNX_VERIFIED, artifact.OM_COMPILED])
def test_only_the_manifest_calls_an_om_verified(checkpoint, tmp_path, status):
    folder = manifest(tmp_path / "a", checkpoint, status)
    assert not find_om(Source(family_of(checkpoint.directory), checkpoint), folder).verified


def test_an_om_that_is_not_as_recorded(checkpoint, tmp_path):
    folder = manifest(tmp_path / "a", checkpoint, artifact.OM_VERIFIED, bytes=3)
    with pytest.raises(ToolkitError, match="vision.om has 2 bytes, its manifest says 3"):
        find_om(Source(family_of(checkpoint.directory), checkpoint), folder)


def test_an_om_of_another_chip(checkpoint, tmp_path, monkeypatch):
    folder = manifest(tmp_path / "a", checkpoint, artifact.OM_VERIFIED, soc="Ascend310P3")
    found = find_om(Source(family_of(checkpoint.directory), checkpoint), folder)
    check_chip(found)  # no npu-smi here: nothing is known
    for name, refused in (("310P3", False), ("910B4", True)):
        table = f"| 0 {name} | OK | 88.2 30 0 / 0 |\n| 0 | 0000:C1:00.0 | 0 0 / 0 26838/ 32768 |"
        monkeypatch.setattr(Host, "run", lambda self, *command, timeout, table=table: (0, table))
        with (
            pytest.raises(
                ToolkitError,
                match="for Ascend310P3, .* has Ascend910B4; .*--soc-version Ascend910B4",
            )
            if refused
            else contextlib.nullcontext()
        ):
            check_chip(found)


def test_an_om_of_another_checkpoint_and_two_oms(checkpoint, tmp_path):
    family = family_of(checkpoint.directory)
    with pytest.raises(ToolkitError, match="another checkpoint"):
        find_om(
            Source(family, checkpoint),
            manifest(tmp_path / "a", checkpoint, artifact.OM_VERIFIED, source="other"),
        )
    for name in ("a.om", "b.om"):
        (checkpoint.directory / name).touch()
    with pytest.raises(
        ToolkitError, match=r"holds 2 .om files \(a.om, b.om\); name one with --artifact"
    ):
        find_om(Source(family, checkpoint))


def wanted(kind, checkpoint, given=None):
    return om_file.OM_FOR[kind](Source(family_of(checkpoint.directory), checkpoint), given)


@pytest.fixture
def an_npu(monkeypatch):
    """What --vision auto looks for: a device file and ais_bench."""
    monkeypatch.setattr(om_file, "npu_nodes", lambda: ["/dev/davinci0"])
    monkeypatch.setattr(om_file, "infer_session", lambda: None)


def test_auto_takes_an_om_where_an_npu_is(checkpoint, tmp_path, an_npu):
    assert wanted("auto", checkpoint) is None  # there is none
    (checkpoint.directory / "blip2.om").touch()
    found = wanted("auto", checkpoint)
    assert found.path.name == "blip2.om" and not found.verified
    assert wanted("om", checkpoint) == found
    folder = manifest(tmp_path / "a", checkpoint, artifact.OM_VERIFIED)
    assert wanted("auto", checkpoint, folder).verified and not wanted("onnx", checkpoint, folder)
    assert wanted("auto", checkpoint, folder / "vision.om").path == folder / "vision.om"
    with pytest.raises(ToolkitError, match="--artifact none.om does not exist"):
        wanted("auto", checkpoint, "none.om")


@pytest.mark.parametrize("place", ["beside", "named", "in the folder named"])
def test_auto_says_where_an_om_cannot_be_used(place, checkpoint, tmp_path, capsys):
    folder = manifest(tmp_path / "a", checkpoint, artifact.OM_VERIFIED)
    given = {"named": folder / "vision.om", "in the folder named": folder}.get(place)
    om = folder / "vision.om"
    if place == "beside":
        om = checkpoint.directory / "blip2.om"
        om.touch()
    with notes_on_stderr():
        assert wanted("auto", checkpoint, given) is None
    told = f"{om} cannot be used here, there is no NPU: the encoder runs on the CPU"
    assert told in capsys.readouterr().err


def test_auto_goes_on_without_ais_bench(checkpoint, monkeypatch, capsys):
    forget()
    monkeypatch.setattr(om_file, "npu_nodes", lambda: ["/dev/davinci0"])
    (checkpoint.directory / "blip2.om").touch()
    with notes_on_stderr():
        assert wanted("auto", checkpoint) is None
    assert "blip2.om cannot be used here (" in capsys.readouterr().err


def test_mistakes(checkpoint):
    with pytest.raises(ToolkitError, match="no .om in the cache, nor in .*--artifact FILE.om"):
        wanted("om", checkpoint)
    with pytest.raises(ToolkitError, match="is an .om, which --vision onnx cannot run"):
        wanted("onnx", checkpoint, "blip2.om")


# the commands


def test_without_ais_bench(tmp_path):
    forget()
    with pytest.raises(
        ToolkitError,
        match="needs ais_bench, which is not installed and not on PyPI; run `pip install ",
    ) as e:
        OmModel(om(tmp_path / "a.om"))
    assert e.value.exit_code == 3 and install_ais_bench() in str(e.value)


def test_what_lacks_is_told_before_the_decoder_is_loaded(checkpoint, monkeypatch):
    forget()
    monkeypatch.setattr(build, "load_decoder", None)
    with pytest.raises(ToolkitError, match="needs ais_bench") as error:
        Engine(checkpoint.directory, vision="om")
    assert error.value.exit_code == 3


def test_no_om_is_told_before_the_decoder_is_loaded(acl, checkpoint, monkeypatch):
    monkeypatch.setattr(build, "load_decoder", None)
    with pytest.raises(ToolkitError, match="no .om in the cache"):
        Engine(checkpoint.directory, vision="om")


def test_without_cann(tmp_path, monkeypatch):
    (tmp_path / "ais_bench" / "infer").mkdir(parents=True)
    text = "raise ImportError('libascendcl.so: cannot open shared object file')"
    (tmp_path / "ais_bench" / "infer" / "interface.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    with pytest.raises(ToolkitError, match="libascendcl.so.*source set_env.sh") as error:
        OmModel(om(tmp_path / "a.om"))
    assert error.value.exit_code == 3
    forget()


@pytest.fixture(scope="session")
def blip2(tmp_path_factory):
    """The golden VisualGLM's encoder with the fp16 NHWC interface of the blip2.om files of older
    guides."""
    from convert.export.trace import trace
    from convert.export.write import write_onnx

    folder = tmp_path_factory.mktemp("blip2")
    family = family_of(GOLDEN)
    write_onnx(trace(family.vision_encoder, family.vision), family, Checkpoint(GOLDEN), folder)
    model = onnx.load(folder / "vision.onnx")
    [given], [result] = model.graph.input, model.graph.output
    for node in model.graph.node:
        node.input[:] = ["input_fp32" if name == given.name else name for name in node.input]
        node.output[:] = ["output_fp32" if name == result.name else name for name in node.output]
    model.graph.node.insert(
        0, helper.make_node("Cast", [given.name], ["input_fp32"], to=TensorProto.FLOAT)
    )
    model.graph.node.append(
        helper.make_node("Cast", ["output_fp32"], [result.name], to=TensorProto.FLOAT16)
    )
    for value in (given, result):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, folder / "blip2.om")
    return folder / "blip2.om"


@pytest.fixture
def opened_blip2(acl, blip2, checkpoint, an_npu):
    """open(kind, scale) -> (session, what was noted): of the checkpoint with a blip2.om beside it,
    whose features are the right ones times `scale`."""
    sessions = []

    def opened(kind, scale=1.0, **settings):
        model = onnx.load(blip2)
        node = model.graph.node[-1]
        model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), "scale"))
        scaled = helper.make_node("Mul", [node.input[0], "scale"], ["y"])
        model.graph.node.insert(len(model.graph.node) - 1, scaled)
        node.input[0] = "y"
        onnx.save(model, checkpoint.directory / "blip2.om")
        family = family_of(checkpoint.directory)
        sessions.append(open_session(kind, family, checkpoint, **settings))
        return sessions[-1]

    yield opened
    for session in sessions:
        session.close()


PIXELS = "nhwc_input"


@pytest.mark.parametrize("kind", ["auto", "om"])
def test_an_om_beside_the_checkpoint_is_verified_once(kind, opened_blip2, capsys):
    golden = np.load(GOLDEN / "golden.npz")
    told = []
    for _ in range(2):
        with notes_on_stderr():
            session = opened_blip2(kind, device="npu:1")
        features = session.encode(golden[PIXELS].astype(np.float32))
        np.testing.assert_allclose(features, golden["image_embeds"], atol=5e-3)
        described = session.describe()
        assert "blip2.om on npu:1" in described and "not verified" not in described
        told.append("used for the first time with this checkpoint" in capsys.readouterr().err)
    assert told == [True, False]


def test_a_passing_compare_marks_an_om_verified(opened_blip2, tmp_path, capsys):
    opened_blip2("om", judge_om=False)  # puts it beside the checkpoint
    folder = tmp_path / "model"
    picture = ["--image", str(GOLDEN / "image.png"), "--prompt", "你好", "--max-tokens", "2"]
    asked = ["--model", str(folder), "--vision", "om", *picture, "--out", str(tmp_path / "report")]
    code = run_command(compare.main, asked)
    assert code == 0, capsys.readouterr().err
    assert "blip2.om passed, and counts as verified from now on" in capsys.readouterr().err
    with notes_on_stderr():
        session = opened_blip2("om")
    assert "not verified" not in session.describe()
    assert "used for the first time" not in capsys.readouterr().err
    assert run_command(compare.main, asked) == 0
    assert "blip2.om on npu:0" in (tmp_path / "report" / "report.json").read_text()


def test_an_om_that_computes_something_else(opened_blip2, monkeypatch, capsys):
    monkeypatch.setattr("runtime.vision.find_or_convert", lambda *given: None)
    monkeypatch.setattr("runtime.vision.noted_if_unverified", lambda *given: True)
    monkeypatch.setattr(
        "runtime.vision.open_onnx", lambda *given, **more: SimpleNamespace(close=str)
    )
    for _ in range(2):  # measured, then remembered
        with pytest.raises(ToolkitError, match="blip2.om does not compute what .* distance") as e:
            opened_blip2("om", scale=1.1)
        assert e.value.exit_code == 1
        with notes_on_stderr():
            assert isinstance(opened_blip2("auto", scale=1.1), SimpleNamespace)
        assert "does not compute what this checkpoint does" in capsys.readouterr().err
    measured = opened_blip2("om", scale=1.1, judge_om=False)  # as runtime.compare opens it
    assert "not verified against this checkpoint" in measured.describe()
    assert not opened_blip2("auto").describe().count("not verified")  # the right one, afterwards


ASKED = [
    "--model",
    str(GOLDEN),
    "--image",
    str(GOLDEN / "image.png"),
    "--prompt",
    "你好",
    "--max-tokens",
    "4",
    "--temperature",
    "0",
    "--repetition-penalty",
    "1",
]


def test_chat_with_an_om(acl, blip2, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert run_command(chat.main, [*ASKED, "--vision", "torch"]) == 0
    answer = capfd.readouterr().out
    code = run_command(
        chat.main, [*ASKED, "--vision", "om", "--artifact", str(blip2), "--device", "cpu"]
    )
    gc.collect()  # the engine is gone, and the session with it
    out, err = capfd.readouterr()
    assert code == 0, err
    assert (
        "picture process time: 0." in err
        and f"s (vision: om {blip2} on npu:0, float16 in, float16 out" in err
    )
    assert "INFO" not in out + err and out == answer
    assert "not verified" not in err


def test_pictures_of_one_prompt_go_through_a_gear_together(acl, opened):
    """Engine asks for all images it has not seen at once, and for each only once."""
    session = opened(batch="n", gears="1,2,4")
    runs = []
    run = session.model.run
    session.model.run = lambda array: runs.append(len(array)) or run(array)
    features = ImageFeatures(lambda: session)
    prompt = Prompt(None, [images(4)[[i]] for i in (0, 1, 0, 2)], None)
    np.testing.assert_allclose(features.of(prompt), expected(images(4)[[0, 1, 0, 2]]), atol=1e-4)
    longer = Prompt(None, [*prompt.pixels, images(4)[[3]]], None)
    assert len(features.of(longer)) == 5 and runs == [4, 1]
