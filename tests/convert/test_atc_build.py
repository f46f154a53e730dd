"""From the verified ONNX to an .om: runs of a stand-in `atc`, its failures, the precision ladder, and graphs made for ATC."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from atc_tools import GOLDEN, MODEL, convert

from convert.atc import aipp, build, command, run
from convert.atc.command import ATC_WORK, VARIANT, OmRequest, atc_options, weight_bytes
from convert.atc.error_advice import CODE, advice
from convert.atc.inputs import write_atc_inputs
from convert.atc.option_rules import check_path
from models import family_of
from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.common.files import file_entry
from runtime.vision import artifact

VISION_MODELS = ("visualglm", "glm4v", "glm_edge_v", "llava")

pytest_plugins = ["atc_fixtures"]
pytestmark = pytest.mark.usefixtures("surroundings")

# from the command to the manifest


def test_compiled_without_a_device(out, cann):
    code, text = convert(out)
    assert code == 0 and "compiled, not verified" in text and "ais_bench" in text
    manifest = artifact.load(out)
    assert (manifest.status, manifest.soc_version, manifest.precision_mode) == (
        artifact.OM_COMPILED,
        "Ascend910B3",
        "fp16",
    )
    assert manifest.om["cann"] == "8.0.RC2" and manifest.om["input"] == {
        "dtype": "float16",
        "shape": [1, 224, 224, 3],
    }
    assert (
        manifest.om["files"] == {"vision.om": file_entry(out / "vision.om")}
        and manifest.om["gears"] == []
    )
    log = (out / manifest.om["log"]).read_text()
    assert (
        shlex.join(manifest.om["command"]) in log
        and "ATC run success" in log
        and "exit status 0" in log
    )
    assert not (out / ATC_WORK).exists() and not (out / "fusion_result.json").exists()


def test_a_second_run_compiles_only_what_changed(out, cann, monkeypatch):
    assert convert(out)[0] == 0
    made = (out / "vision.om").stat().st_mtime_ns
    monkeypatch.setenv("STAND_IN_ATC", "E19999 must not be started")
    assert convert(out)[0] == 0 and (out / "vision.om").stat().st_mtime_ns == made
    code, text = convert(out, "--soc-version", "Ascend310P3")
    assert code == 1 and "E19999" in text and artifact.load(out).soc_version == "Ascend910B3"
    monkeypatch.delenv("STAND_IN_ATC")
    assert (
        convert(out, "--soc-version", "Ascend310P3")[0] == 0
        and artifact.load(out).soc_version == "Ascend310P3"
    )


def test_an_om_replaced_by_hand_is_made_again(out, cann):
    assert convert(out)[0] == 0
    assert artifact.om_file(artifact.load(out), out) == out / "vision.om"
    (out / "vision.om").write_bytes(b"another")
    with pytest.raises(ToolkitError, match="vision.om has 7 bytes, its manifest says"):
        artifact.om_file(artifact.load(out), out)
    assert convert(out)[0] == 0 and artifact.om_file(artifact.load(out), out) == out / "vision.om"


def test_a_flipped_bit_of_an_om_is_named_and_compiled_again(out, cann):
    assert convert(out)[0] == 0
    flip_a_bit(out / "vision.om")
    with pytest.raises(ToolkitError, match="vision.om is damaged"):
        artifact.om_file(artifact.load(out), out)
    code, text = convert(out)
    assert code == 0 and "compiled for" in text
    assert artifact.om_file(artifact.load(out), out) == out / "vision.om"


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["weight", ".partial"])
def test_links_in_the_artifact_are_not_followed(out, cann, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("the only copy")
    (out / name).symlink_to(elsewhere)
    convert(out, "--force")
    assert (elsewhere / "thesis").read_text() == "the only copy"
    assert [file.name for file in elsewhere.iterdir()] == ["thesis"]


def test_mistakes_are_found_without_cann_too(tmp_path):
    code, text = convert(
        tmp_path / "out", "--soc-version", "Ascend310P3", "--precision-mode", "mixed_bfloat16"
    )
    assert code == 2 and "bfloat16" in text and not (tmp_path / "out").exists()


def test_onnx_only_leaves_atc_alone(out, cann):
    code, text = convert(out, "--onnx-only")
    assert code == 0 and "where CANN is installed" in text and artifact.load(out).om is None


def test_aipp_and_gears_end_to_end(out, cann):
    code, text = convert(out, "--aipp", "--dynamic-batch", "1,2,4", "--soc-version", "Ascend310P3")
    assert code == 0 and "verify vision_atc.onnx" in text and "pass" in text, text
    manifest = artifact.load(out)
    assert manifest.om["input"]["dtype"] == "uint8" and manifest.om["gears"] == [1, 2, 4]
    assert (
        convert(out, "--aipp", "--dynamic-batch", "1,2,4", "--soc-version", "Ascend310P3")[0] == 0
    )


@pytest.mark.parametrize(
    "behaviour, files",
    [("suffix", {"vision_linux_x86_64.om"}), ("weights", {"vision.om", "weight/weight_0"})],
)
def test_other_files_that_mean_success(out, cann, monkeypatch, behaviour, files):
    monkeypatch.setenv("STAND_IN_ATC", behaviour)
    (out / "vision_linux_aarch64.om").write_bytes(b"old")
    assert convert(out)[0] == 0
    assert set(artifact.load(out).om["files"]) == files and all(
        (out / name).is_file() for name in files
    )
    assert len(list(out.glob("*.om"))) == 1


@pytest.mark.parametrize(
    "behaviour, says",
    [
        ("killed", "killed by signal 9"),
        ("wrapper killed", "killed by signal 9"),
        ("silent", "without its success line"),
        ("no file", "left 0 usable .om files"),
        ("two files", "left 2 usable .om files"),
        ("disk full", "the disk is full"),
        ("no permission", "may not be read or written"),
        ("library", "set_env.sh"),
        (
            "E16002 No parser is registered for Op [ai.onnx::17::Attention]",
            "[ai.onnx::17::Attention]): use CANN 7.0 or newer",
        ),
        (
            "EZ3003 No supported Ops kernel and engine are found for [Erf]",
            "install the ops (kernels) package",
        ),
        ("E20007 Failed to run graph fusion pass", "fusion engine"),
        ("E10501 IR for Op [x] is not registered", "source CANN's set_env.sh"),
    ],
)
def test_failures_of_atc(out, cann, monkeypatch, behaviour, says):
    monkeypatch.setenv("STAND_IN_ATC", behaviour)
    before = (out / "manifest.json").read_bytes()
    code, text = convert(out)
    assert (
        code == 1
        and says in text
        and "atc_fp16.log" in text
        and text.splitlines()[-1].startswith("error: ")
    )
    assert (
        (out / "manifest.json").read_bytes() == before
        and not list(out.glob("*.om"))
        and not (out / ATC_WORK).exists()
    )
    assert "exit status" in (out / "atc_fp16.log").read_text()


def test_advice_in_chinese(out, cann, monkeypatch):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv(
        "STAND_IN_ATC", "EZ3003 No supported Ops kernel and engine are found for [Erf]"
    )
    assert "安装与 --soc-version 匹配的算子包" in convert(out)[1]


def test_every_entry_of_the_error_table():
    table = json.loads(
        Path(run.__file__).with_name("error_advice.json").read_text(encoding="utf-8")
    )
    assert all(CODE.fullmatch(code) for code in table["codes"]) and len(table["codes"]) > 40
    for entry in (entry for part in table.values() for entry in part.values()):
        assert all(len(entry[language]) == 2 and all(entry[language]) for language in ("en", "zh"))
        assert all(max(text) >= "\u4e00" for text in entry["zh"] if not text.startswith("pip"))


def test_codes_without_an_entry_of_their_own_have_their_family():
    [said] = advice("E20123: no such pass [x]")
    assert said.startswith("E20123: the fusion engine stopped") and "no such pass" in said
    assert advice("all went wrong") == [] and advice("W11001: slow") == []


def test_an_interrupted_atc_is_ended(out, cann, monkeypatch):
    monkeypatch.setenv("STAND_IN_ATC", "slow")
    ended = []
    monkeypatch.setattr(
        os,
        "killpg",
        lambda group, number, kill=os.killpg: (ended.append(group), kill(group, number)),
    )
    real = run.subprocess.Popen.wait

    def interrupted(self, timeout=None):
        if not ended:
            raise KeyboardInterrupt
        return real(self, timeout)

    monkeypatch.setattr(run.subprocess.Popen, "wait", interrupted)
    code, text = convert(out)
    assert (
        code == 130
        and len(ended) == 1
        and not (out / ATC_WORK).exists()
        and artifact.load(out).om is None
    )


def test_a_full_disk_is_noticed_before_atc(out, cann, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 95, 5))
    code, text = convert(out)
    assert code == 2 and "only 0.0 are free" in text and not (out / "atc_fp16.log").exists()


def test_paths_that_atc_does_not_take(converted, tmp_path, cann):
    for name, says in (("my models", "' '"), ("a+b", "'+'"), ("视觉", None)):
        folder = shutil.copytree(converted, tmp_path / name)
        code, text = convert(folder)
        assert (code, says is None or says in text) == (0 if says is None else 2, True), text
    with pytest.raises(ToolkitError, match="4,096 bytes"):
        check_path("/tmp/" + "a" * 4100)


def test_the_script_compiles_in_place(out, cann):
    (out / "weight").mkdir()
    assert os.system(f"cd / && sh {shlex.quote(str(out / 'atc.sh'))} > {out}/said") == 0
    assert (out / "vision.om").is_file() and "success" in (out / "said").read_text()


# the precision ladder, on a stand-in session

ERRORS = {"fp16": 0.2, "mixed_float16": 0.1, "origin": 1e-4}


@pytest.fixture
def device(monkeypatch):
    """A stand-in for an .om session: the ONNX in the stand-in's .om, with an error that depends on the precision mode."""
    errors = dict(ERRORS)

    def open_om(path, family, device):
        model = onnx.load(path)
        mode = {p.key: p.value for p in model.metadata_props}["precision_mode_v2"]
        session = onnxruntime.InferenceSession(model.SerializeToString())

        def encode(raw):
            if errors[mode] is None:
                raise ToolkitError("OM gave NaN or Inf", 1)
            kind = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16}[
                session.get_inputs()[0].type
            ]
            pictures = raw.astype(kind)
            features = np.concatenate(
                [session.run(None, {"input": p[None]})[0].astype(np.float32) for p in pictures]
            )
            return (
                features
                + errors[mode]
                * np.random.default_rng(0).normal(size=features.shape)
                * features.std()
            )

        def encode_all(pictures):
            return list(encode(np.concatenate(pictures)))

        return SimpleNamespace(encode_all=encode_all, close=lambda: None)

    monkeypatch.setattr(build, "open_om", open_om)
    return errors


def test_the_ladder_climbs_until_the_threshold_holds(out, cann, device):
    code, text = convert(out)
    assert code == 0 and "OM verified" in text, text
    manifest = artifact.load(out)
    assert (manifest.status, manifest.precision_mode) == (artifact.OM_VERIFIED, "origin")
    tried = [(a["mode"], a["passed"]) for a in manifest.om["attempts"]]
    assert tried == [("fp16", False), ("mixed_float16", False), ("origin", True)]
    assert all(a["latency_ms"] > 0 and 0.9 < a["cosine"] <= 1 for a in manifest.om["attempts"])
    assert "--modify_mixlist=../vision_mixlist.json" in (out / "atc_mixed_float16.log").read_text()
    code, text = convert(out)
    assert code == 0 and "verified already" in text


def test_a_later_mode_that_does_not_compile_is_passed_over(out, cann, device, monkeypatch):
    def run_atc(toolkit, arguments, work_dir, log, real=build.run_atc):
        if "--precision_mode_v2=mixed_float16" in arguments:
            raise ToolkitError("atc failed (exit status 255)", 1)
        return real(toolkit, arguments, work_dir, log)

    monkeypatch.setattr(build, "run_atc", run_atc)
    code, text = convert(out)
    assert (
        code == 0
        and "mixed_float16: atc failed" in text
        and artifact.load(out).precision_mode == "origin"
    )


def test_a_good_first_mode_is_kept(out, cann, device):
    device["fp16"] = 0.01
    assert convert(out)[0] == 0
    manifest = artifact.load(out)
    assert (manifest.status, manifest.precision_mode) == (artifact.OM_VERIFIED, "fp16")


def test_a_failing_om_is_never_kept(out, cann, device):
    code, text = convert(out, "--precision-mode", "fp16")
    assert code == 1 and "no .om was kept" in text and "FAIL" in text
    assert artifact.load(out).om is None and not list(out.glob("*.om"))


@pytest.mark.parametrize("flags", ["--aipp", "--dynamic-batch 1,2", "--aipp --dynamic-batch 1,2"])
def test_variants_pass_on_the_device(out, cann, device, flags):
    """The stand-in's .om holds the arithmetic of the AIPP file that convert wrote."""
    device["fp16"] = 1e-4
    assert convert(out, *flags.split())[0] == 0
    [attempt] = artifact.load(out).om["attempts"]
    assert attempt["cosine"] > 0.99999 and attempt["distance"] < 2e-3


@pytest.mark.parametrize("flags", ["", "--aipp --dynamic-batch 1,2"])
def test_through_the_runtime(out, cann, monkeypatch, flags):
    """The runtime's own session over the stand-in aclruntime (tests/ascend)."""
    for folder in ("ascend", "ascend/2026"):
        monkeypatch.syspath_prepend(GOLDEN.parent / folder)
    code, text = convert(out, *flags.split())
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] in ("aclruntime", "ais_bench", "stand_in_aclruntime")
    ]:
        monkeypatch.delitem(sys.modules, name)
    assert code == 0 and "OM verified" in text, text


def test_nan_climbs_too(out, cann, device):
    device["fp16"] = None
    assert convert(out)[0] == 0
    first = artifact.load(out).om["attempts"][0]
    assert not first["passed"] and "NaN" in first["error"]


def test_an_om_compiled_elsewhere_is_verified_later(out, cann, device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            build,
            "open_om",
            lambda *_: (_ for _ in ()).throw(ToolkitError("no device", MISSING_COMPONENT)),
        )
        assert convert(out)[0] == 0 and artifact.load(out).status == artifact.OM_COMPILED
    monkeypatch.setenv("STAND_IN_ATC", "E19999 must not be started")
    device["fp16"] = 0.01
    code, text = convert(out)
    assert code == 0 and artifact.load(out).status == artifact.OM_VERIFIED, text


def test_an_om_that_turns_out_bad_is_taken_back(out, cann, device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            build,
            "open_om",
            lambda *_: (_ for _ in ()).throw(ToolkitError("no device", MISSING_COMPONENT)),
        )
        assert convert(out, "--precision-mode", "fp16")[0] == 0
    assert convert(out, "--precision-mode", "fp16")[0] == 1
    assert artifact.load(out).status == artifact.ONNX_VERIFIED and not list(out.glob("*.om"))


# graphs made for ATC


@pytest.mark.parametrize("name", VISION_MODELS)
def test_graphs_for_atc_compute_the_same(converted, tmp_path, name):
    """Both changes at once; each alone is in `prepared`."""
    family = family_of(GOLDEN / name)
    folder = shutil.copytree(converted, tmp_path / "out")
    if family.directory != MODEL:
        code, text = convert(folder, "--force", model=family.directory)
        assert code == 0, text
    write_atc_inputs(
        family, folder, OmRequest("Ascend310P3", aipp=True, gears=(1, 2))
    )  # compares; a difference raises
    model = onnx.load(folder / VARIANT, load_external_data=False)
    onnx.checker.check_model(str(folder / VARIANT), full_check=True)
    known = json.loads(
        (Path(command.__file__).parents[1] / "verify" / "onnx_ops_cann.json").read_text()
    )
    assert {node.op_type for node in model.graph.node} <= set(known) and "Shape" not in str(
        model.graph.node
    )
    [value] = model.graph.input
    _, height, width, channels = family.vision.input_shape
    shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    assert shape == ["batch", channels, height, width]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_aipp_arithmetic(name):
    """In fp16, as the hardware computes, within 0.002 of the exact normalisation of every 8-bit value."""
    family = family_of(GOLDEN / name)
    _, normalize = aipp.normalization(family)
    raw = np.repeat(np.arange(256, dtype=np.float32).reshape(1, 256, 1, 1), 3, axis=3)
    exact = ((raw / 255 - np.array(normalize.mean)) / np.array(normalize.std)).transpose(0, 3, 1, 2)
    config = aipp.aipp_config(family)
    assert np.abs(aipp.apply_aipp(config, raw, np.float64) - exact).max() < 1e-6
    assert np.abs(aipp.apply_aipp(config, raw, np.float16) - exact).max() < 2e-3


def test_aipp_refuses_what_it_cannot_replace(monkeypatch):
    family = family_of(MODEL)
    monkeypatch.setattr(aipp, "MAX_SIDE", 100)
    with pytest.raises(ToolkitError, match="leave --aipp out"):
        aipp.aipp_config(family)


def test_weights_above_the_limit_of_a_part_go_beside_the_om(monkeypatch):
    family = family_of(MODEL)
    monkeypatch.setattr(command, "OM_PART_BYTES", weight_bytes(family, "origin") - 1)
    assert "external_weight" not in atc_options(OmRequest("Ascend910B3"), family, "fp16")
    assert atc_options(OmRequest("Ascend910B3"), family, "origin")["external_weight"] == "1"
