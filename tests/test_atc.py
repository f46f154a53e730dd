"""ATC: a table of good and bad `convert` invocations, and runs of a stand-in `atc` from the command line to the manifest.

The stand-in (stand_in_atc.py) enforces the documented grammar and exit protocol; it compiles nothing.
"""
import contextlib
import io
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
import stand_in_atc

from convert import __main__ as command
from convert import atc, atc_options, atc_run, om, reference, variant, verify
from convert.atc import Request
from models import family_of
from runtime import artifact
from runtime.errors import MISSING_COMPONENT, ToolkitError, run_command

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "visualglm"
VISION_MODELS = ("visualglm", "glm4v", "glm_edge_v", "llava")


def convert(out, *more, model=MODEL) -> tuple[int, str]:
    """(exit code, everything printed) of `python -m convert`, run in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_command(command.main, ["--model", str(model), "--out", str(out), *more])
    return code, printed.getvalue()


def in_process(family, graph, aipp=None):
    return reference.compute(str(family.directory), str(graph), aipp and str(aipp))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """No CANN but what a test installs, an own cache, English, and no child process for ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(reference, "features", in_process)
        patch.setattr(verify, "verify", lambda family, directory, folder, need: verify.measure(directory, folder))
        for name in (*atc_run.HOMES, "LC_ALL", "LC_MESSAGES", "STAND_IN_ATC"):
            patch.delenv(name, raising=False)
        patch.setenv("LANG", "en_US.UTF-8")
        patch.setenv("PATH", "/usr/bin:/bin")
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    code, text = convert(out)
    assert code == 0 and "where CANN is installed" in text, text
    return out


@pytest.fixture
def out(converted, tmp_path):
    """A verified ONNX artifact of one's own."""
    return shutil.copytree(converted, tmp_path / "out")


def install(root: Path, monkeypatch, version: str | None = "8.0.RC2") -> Path:
    """The stand-in as <root>/bin/atc on PATH, with CANN's version file."""
    (root / "bin").mkdir(parents=True)
    tool = root / "bin" / "atc"
    tool.write_text(f"#!/bin/bash\n{sys.executable} {stand_in_atc.__file__} {version or '9.0'} \"$@\"\n")
    tool.chmod(0o755)
    if version:
        (root / "x86_64-linux").mkdir()
        (root / "x86_64-linux" / "ascend_toolkit_install.info").write_text(
            f"package_name=Ascend-cann-toolkit\nversion={version}\narch=x86_64\nos=linux\n")
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return tool


@pytest.fixture
def cann(tmp_path, monkeypatch):
    return install(tmp_path / "cann", monkeypatch)


# the table: flags, and what the atc command must hold or leave out (!), or the refusal

GOOD = [
    ("", "--model=../vision.onnx --framework=5 --output=vision --soc_version=Ascend910B3 --precision_mode_v2=fp16 "
         "--input_shape=input:1,224,224,3 --input_fp16_nodes=input --output_type=FP16 --input_format=NCHW"),
    ("--soc-version Ascend310P3", "--soc_version=Ascend310P3 --precision_mode_v2=fp16"),
    ("--soc_version Ascend910B4-1", "--soc_version=Ascend910B4-1"),
    ("--soc-version Ascend910_9382", "--soc_version=Ascend910_9382"),
    ("--precision-mode origin", "--precision_mode_v2=origin !--modify_mixlist"),
    ("--precision-mode mixed_float16", "--precision_mode_v2=mixed_float16 --modify_mixlist=../vision_mixlist.json"),
    ("--precision-mode mixed_bfloat16", "--precision_mode_v2=mixed_bfloat16"),
    ("--precision-mode cube_fp16in_fp32out", "--precision_mode_v2=cube_fp16in_fp32out"),
    ("--precision-mode must_keep_origin_dtype", "--precision_mode=must_keep_origin_dtype !--precision_mode_v2"),
    ("--precision-mode allow_mix_precision", "--precision_mode=allow_mix_precision --modify_mixlist"),
    ("--dynamic-batch 1,2,4,8", "--model=../vision_atc.onnx --dynamic_batch_size=1,2,4,8 "
                                "--input_shape=input:-1,224,224,3"),
    ("--dynamic-batch 4,1", "--dynamic_batch_size=1,4"),
    ("--aipp", "--model=../vision_atc.onnx --insert_op_conf=../vision_aipp.cfg --input_shape=input:1,3,224,224 "
               "!--input_fp16_nodes"),
    ("--aipp --dynamic-batch 1,2", "--insert_op_conf=../vision_aipp.cfg --input_shape=input:-1,3,224,224 "
                                   "--dynamic_batch_size=1,2"),
    ("--atc-arg log=info", "--log=info !--log=error"),
    ("--atc-arg=--log=debug", "--log=debug"),
    ("--atc-arg output_type=FP32", "--output_type=FP32 !--output_type=FP16"),
    ("--atc-arg external-weight=1", "--external_weight=1"),
    ("--atc-arg op_select_implmode=high_performance --atc-arg optypelist_for_implmode=Gelu,Sigmoid",
     "--op_select_implmode=high_performance --optypelist_for_implmode=Gelu,Sigmoid"),
    ("--atc-arg keep_dtype={file}", "--keep_dtype={file}"),
    ("--precision-mode mixed_float16 --atc-arg modify_mixlist={file}",
     "--modify_mixlist={file} !--modify_mixlist=../vision_mixlist.json"),
    ("--atc-arg input_format=ND", "--input_format=ND"),
    ("--atc-arg buffer_optimize=off_optimize --atc-arg deterministic=1", "--buffer_optimize=off_optimize --deterministic=1"),
]
BAD = [
    ("--soc-version Ascend910B", "first 910"),
    ("--soc-version 910B3", "e.g. Ascend910B3"),
    ("--soc-version ascend310p3", "e.g. Ascend310P3"),
    ("--soc-version Ascend999", "npu-smi"),
    ("--soc-version Ascend310P3 --precision-mode mixed_bfloat16", "bfloat16"),
    ("--soc-version Ascend310P3 --precision-mode allow_mix_precision_bf16", "bfloat16"),
    ("--precision-mode fp8", "use auto, fp16"),
    ("--precision-mode mixed_hif8", "Ascend950 only"),
    ("--dynamic-batch 1", "2 to 100"),
    ("--dynamic-batch 1,1", "different"),
    ("--dynamic-batch 0,1", "above 0"),
    ("--dynamic-batch 2,4", "1 must be among"),
    ("--dynamic-batch one,two", "with commas"),
    ("--dynamic-batch " + ",".join(map(str, range(1, 102))), "2 to 100"),
    ("--atc-arg log", "KEY=VALUE|one option with its value"),
    ("--atc-arg log=", "one option with its value"),
    ("--atc-arg log=loud", "debug, info, warning"),
    ("--atc-arg log=info --atc-arg log=error", "twice"),
    ("--atc-arg soc_version=Ascend310P3", "--soc-version"),
    ("--atc-arg precision_mode=force_fp16", "--precision-mode"),
    ("--atc-arg precision-mode-v2=origin", "--precision-mode"),
    ("--atc-arg=--dynamic_batch_size=1,2", "--dynamic-batch"),
    ("--atc-arg dynamic_dims=1;2", "fixed"),
    ("--atc-arg=--insert_op_conf=a.cfg", "--aipp"),
    ("--atc-arg model=a.onnx", "exported graph"),
    ("--atc-arg output=/tmp/x", "--out"),
    ("--atc-arg input_shape=input:2,224,224,3", "the family's"),
    ("--atc-arg input_format=NHWC", "only a label"),
    ("--aipp --atc-arg input_format=ND", "NCHW inputs only"),
    ("--soc-version Ascend910A --precision-mode mixed_bfloat16", "bfloat16"),
    ("--atc-arg output_type=INT8", "FP32, FP16"),
    ("--atc-arg external_weight=yes", "0, 1, 2"),
    ("--atc-arg auto_tune_mode=RL", "AOE"),
    ("--atc-arg enable_onnx_checker=1", "no such option"),
    ("--atc-arg buffer_optimise=off_optimize", "did you mean buffer_optimize"),
    ("--atc-arg keep_dtype=/nowhere/list.txt", "does not exist"),
    ("--atc-arg modify_mixlist={file}", "mixed precision"),
    ("--atc-arg optypelist_for_implmode=Gelu", "op_select_implmode"),
    ("--atc-arg optypelist_for_implmode=Gelu --atc-arg op_select_implmode=high_precision_for_all", "op_select_implmode"),
    ("--atc-arg deterministic_level=1", "both"),
    ("--atc-arg compress_weight_conf={file} --atc-arg enable_compress_weight=true", "exclude"),
    ("--precision-mode origin --atc-arg compression_optimize_conf={file}", "compression_optimize_conf"),
    ("--atc-arg", "expected one argument"),
]


TABLE_HEAD = ("Written by tests/test_atc.py, which also runs every good line on a stand-in for atc and checks that a bad one "
              "ends\nwith exit code 2. All for VisualGLM's tiny test checkpoint, without CANN, as "
              "`python -m convert --model DIR --out DIR\n--dry-run FLAGS` answers.")


@pytest.fixture(scope="module")
def prepared(converted, tmp_path_factory):
    """Folders with the files that the command lines name, one for each kind of graph."""
    family, folders = family_of(MODEL), {}
    for aipp in (False, True):
        for gears in ((), (1, 2)):
            folders[aipp, bool(gears)] = shutil.copytree(converted, tmp_path_factory.mktemp("prepared") / "out")
            om.prepare(family, folders[aipp, bool(gears)], Request("Ascend910B3", aipp=aipp, gears=gears))
            (folders[aipp, bool(gears)] / atc.WORK).mkdir()
    return folders


@pytest.mark.parametrize("flags, parts", GOOD, ids=[flags or "none" for flags, _ in GOOD])
def test_good_invocations(prepared, tmp_path, monkeypatch, capsys, flags, parts):
    file = tmp_path / "list.json"
    file.write_text("{}")
    flags, parts = (shlex.split(text.format(file=file)) for text in (flags, parts))
    code, text = convert(tmp_path / "out", "--dry-run", *flags)
    assert code == 0 and not (tmp_path / "out").exists(), text
    arguments = shlex.split(text.splitlines()[-1])
    for part in parts:
        held = any(a.startswith(part.lstrip("!")) for a in arguments)
        assert held != part.startswith("!"), (part, arguments)
    monkeypatch.chdir(prepared["--aipp" in flags, "--dynamic-batch" in flags] / atc.WORK)
    assert stand_in_atc.main(arguments[1:], 8) == 0, capsys.readouterr().out
    assert (Path.cwd() / "vision.om").is_file()
    shutil.rmtree("weight", ignore_errors=True)


@pytest.mark.parametrize("flags, says", BAD, ids=[flags[:60] for flags, _ in BAD])
def test_bad_invocations(tmp_path, flags, says):
    file = tmp_path / "list.json"
    file.write_text("{}")
    code, text = convert(tmp_path / "out", "--dry-run", *shlex.split(flags.format(file=file).replace(";", "\\;")))
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert any(each in text for each in says.split("|")), text


def test_the_table_in_docs(tmp_path, monkeypatch):
    """docs/atc-invocations.md shows what the two lists above give; REFRESH_DOCS=1 writes it anew."""
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("{}")

    def run(flags):
        code, text = convert(tmp_path / "out", "--dry-run", *shlex.split(flags.replace(";", "\\;")))
        return code, text.splitlines()[-1].strip().replace(str(tmp_path), "DIR").replace("|", "\\|")
    usual = run("")[1].split()
    lines = ["# What convert makes of its flags", "", TABLE_HEAD, "", "No flags: `" + " ".join(usual) + "`", "",
             "| flags | options of atc that differ |", "|---|---|"]
    for flags, _ in GOOD[1:]:
        words = run(flags.format(file="list.json"))[1].split()
        lines.append(f"| `{flags.format(file='list.json')}` | `{' '.join(w for w in words if w not in usual)}` |")
    lines += ["", "| flags | refusal |", "|---|---|"]
    for flags, _ in BAD:
        shown = flags.format(file="list.json")
        lines.append(f"| `{shown if len(shown) < 90 else shown[:50] + '...'}` | {run(shown)[1].removeprefix('error: ')} |")
    page = Path(__file__).parents[1] / "docs" / "atc-invocations.md"
    text = "\n".join(lines) + "\n"
    if os.environ.get("REFRESH_DOCS"):
        page.write_text(text, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text, "REFRESH_DOCS=1 python -m pytest tests/test_atc.py, then read the diff"


# which CANN

@pytest.mark.parametrize("version, flags, says", [
    ("8.0.RC2", "--atc-arg external_weight=2", "needs CANN 9.0, installed is 8.0.RC2"),
    ("8.5.0", "--atc-arg jit_compile=2", "needs CANN 9.0"),
    ("8.3.RC1", "--soc-version Ascend950PR_9589 --precision-mode mixed_hif8", "needs CANN 9.0"),
    ("6.3.RC2", "", "install CANN 7.0"),
])
def test_options_that_the_installed_cann_lacks(tmp_path, monkeypatch, version, flags, says):
    install(tmp_path / "cann", monkeypatch, version)
    code, text = convert(tmp_path / "out", *shlex.split(flags))
    assert code == 2 and says in text and not (tmp_path / "out").exists()


def test_newer_options_pass_where_they_are_known(tmp_path, monkeypatch):
    install(tmp_path / "cann", monkeypatch, "9.1.0")
    code, text = convert(tmp_path / "out", "--dry-run", "--atc-arg", "jit_compile=2")
    assert code == 0 and "CANN 9.1.0" in text and "--jit_compile=2" in text


def test_the_toolkit_is_found_by_the_variables_of_set_env(tmp_path, monkeypatch):
    tool = install(tmp_path / "cann", monkeypatch, "7.0.1")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert atc_run.find() is None
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    assert atc_run.find() == atc_run.Toolkit(tool, "7.0.1")


def test_an_unknown_cann_version_is_said(tmp_path, monkeypatch):
    install(tmp_path / "cann", monkeypatch, None)
    code, text = convert(tmp_path / "out", "--dry-run")
    assert code == 0 and "CANN of unknown version" in text


# from the command to the manifest

def test_compiled_without_a_device(out, cann):
    code, text = convert(out)
    assert code == 0 and "compiled, not verified" in text and "ais_bench" in text
    manifest = artifact.load(out)
    assert (manifest.status, manifest.soc_version, manifest.precision_mode) == (artifact.OM_COMPILED, "Ascend910B3", "fp16")
    assert manifest.om["cann"] == "8.0.RC2" and manifest.om["input"] == {"dtype": "float16", "shape": [1, 224, 224, 3]}
    assert manifest.om["files"] == {"vision.om": om.entry(out / "vision.om")} and manifest.om["gears"] == []
    log = (out / manifest.om["log"]).read_text()
    assert shlex.join(manifest.om["command"]) in log and "ATC run success" in log and "exit status 0" in log
    assert not (out / atc.WORK).exists() and not (out / "fusion_result.json").exists()


def test_a_second_run_compiles_only_what_changed(out, cann, monkeypatch):
    assert convert(out)[0] == 0
    made = (out / "vision.om").stat().st_mtime_ns
    monkeypatch.setenv("STAND_IN_ATC", "E19999 must not be started")
    assert convert(out)[0] == 0 and (out / "vision.om").stat().st_mtime_ns == made
    code, text = convert(out, "--soc-version", "Ascend310P3")
    assert code == 1 and "E19999" in text and artifact.load(out).soc_version == "Ascend910B3"
    monkeypatch.delenv("STAND_IN_ATC")
    assert convert(out, "--soc-version", "Ascend310P3")[0] == 0 and artifact.load(out).soc_version == "Ascend310P3"


def test_an_om_replaced_by_hand_is_made_again(out, cann):
    assert convert(out)[0] == 0
    assert artifact.om_file(artifact.load(out), out) == out / "vision.om"
    (out / "vision.om").write_bytes(b"another")
    assert artifact.om_file(artifact.load(out), out) is None
    assert convert(out)[0] == 0 and artifact.om_file(artifact.load(out), out) == out / "vision.om"


def test_mistakes_are_found_without_cann_too(tmp_path):
    code, text = convert(tmp_path / "out", "--soc-version", "Ascend310P3", "--precision-mode", "mixed_bfloat16")
    assert code == 2 and "bfloat16" in text and not (tmp_path / "out").exists()


def test_onnx_only_leaves_atc_alone(out, cann):
    code, text = convert(out, "--onnx-only")
    assert code == 0 and "where CANN is installed" in text and artifact.load(out).om is None


def test_aipp_and_gears_end_to_end(out, cann):
    code, text = convert(out, "--aipp", "--dynamic-batch", "1,2,4", "--soc-version", "Ascend310P3")
    assert code == 0 and "verify vision_atc.onnx" in text and "pass" in text, text
    manifest = artifact.load(out)
    assert manifest.om["input"]["dtype"] == "uint8" and manifest.om["gears"] == [1, 2, 4]
    assert convert(out, "--aipp", "--dynamic-batch", "1,2,4", "--soc-version", "Ascend310P3")[0] == 0


@pytest.mark.parametrize("behaviour, files", [
    ("suffix", {"vision_linux_x86_64.om"}), ("weights", {"vision.om", "weight/weight_0"})])
def test_other_files_that_mean_success(out, cann, monkeypatch, behaviour, files):
    monkeypatch.setenv("STAND_IN_ATC", behaviour)
    (out / "vision_linux_aarch64.om").write_bytes(b"old")
    assert convert(out)[0] == 0
    assert set(artifact.load(out).om["files"]) == files and all((out / name).is_file() for name in files)
    assert len(list(out.glob("*.om"))) == 1


@pytest.mark.parametrize("behaviour, says", [
    ("killed", "killed by signal 9"),
    ("wrapper killed", "killed by signal 9"),
    ("silent", "without its success line"),
    ("no file", "left 0 usable .om files"),
    ("two files", "left 2 usable .om files"),
    ("disk full", "the disk is full"),
    ("no permission", "may not be read or written"),
    ("library", "set_env.sh"),
    ("E16002 No parser is registered for Op [ai.onnx::17::Attention]", "[ai.onnx::17::Attention]): use CANN 7.0 or newer"),
    ("EZ3003 No supported Ops kernel and engine are found for [Erf]", "install the ops (kernels) package"),
    ("E20007 Failed to run graph fusion pass", "fusion engine"),
    ("E10501 IR for Op [x] is not registered", "source CANN's set_env.sh"),
])
def test_failures_of_atc(out, cann, monkeypatch, behaviour, says):
    monkeypatch.setenv("STAND_IN_ATC", behaviour)
    before = (out / "manifest.json").read_bytes()
    code, text = convert(out)
    assert code == 1 and says in text and "atc_fp16.log" in text and text.splitlines()[-1].startswith("error: ")
    assert (out / "manifest.json").read_bytes() == before and not list(out.glob("*.om")) and not (out / atc.WORK).exists()
    assert "exit status" in (out / "atc_fp16.log").read_text()


def test_advice_in_chinese(out, cann, monkeypatch):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv("STAND_IN_ATC", "EZ3003 No supported Ops kernel and engine are found for [Erf]")
    assert "安装与 --soc-version 匹配的算子包" in convert(out)[1]


def test_every_entry_of_the_error_table():
    table = json.loads(Path(atc_run.__file__).with_name("atc_errors.json").read_text(encoding="utf-8"))
    assert all(atc_run.CODE.fullmatch(code) for code in table["codes"]) and len(table["codes"]) > 40
    for entry in (entry for part in table.values() for entry in part.values()):
        assert all(len(entry[language]) == 2 and all(entry[language]) for language in ("en", "zh"))
        assert all(max(text) >= "\u4e00" for text in entry["zh"] if not text.startswith("pip"))


def test_codes_without_an_entry_of_their_own_have_their_family():
    [said] = atc_run.advice("E20123: no such pass [x]")
    assert said.startswith("E20123: the fusion engine stopped") and "no such pass" in said
    assert atc_run.advice("all went wrong") == [] and atc_run.advice("W11001: slow") == []


def test_an_interrupted_atc_is_ended(out, cann, monkeypatch):
    monkeypatch.setenv("STAND_IN_ATC", "slow")
    ended = []
    monkeypatch.setattr(os, "killpg", lambda group, number, kill=os.killpg: (ended.append(group), kill(group, number)))
    real = atc_run.subprocess.Popen.wait

    def interrupted(self, timeout=None):
        if not ended:
            raise KeyboardInterrupt
        return real(self, timeout)
    monkeypatch.setattr(atc_run.subprocess.Popen, "wait", interrupted)
    code, text = convert(out)
    assert code == 130 and len(ended) == 1 and not (out / atc.WORK).exists() and artifact.load(out).om is None


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
        atc_options.check_path("/tmp/" + "a" * 4100)


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

    def open_om(path, spec, device):
        model = onnx.load(path)
        mode = {p.key: p.value for p in model.metadata_props}["precision_mode_v2"]
        session = onnxruntime.InferenceSession(model.SerializeToString())

        def encode(raw):
            if errors[mode] is None:
                raise ToolkitError("OM gave NaN or Inf", 1)
            kind = {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16}[session.get_inputs()[0].type]
            pictures = raw.astype(kind)
            features = np.concatenate([session.run(None, {"input": p[None]})[0].astype(np.float32) for p in pictures])
            return features + errors[mode] * np.random.default_rng(0).normal(size=features.shape) * features.std()
        return SimpleNamespace(encode=encode, close=lambda: None)
    monkeypatch.setattr(om, "open_om", open_om)
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
    def run(toolkit, arguments, work, log, real=atc_run.run):
        if "--precision_mode_v2=mixed_float16" in arguments:
            raise ToolkitError("atc failed (exit status 255)", 1)
        return real(toolkit, arguments, work, log)
    monkeypatch.setattr(atc_run, "run", run)
    code, text = convert(out)
    assert code == 0 and "mixed_float16: atc failed" in text and artifact.load(out).precision_mode == "origin"


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
    pytest.importorskip("runtime.om")
    for folder in ("ascend", "ascend/2026"):
        monkeypatch.syspath_prepend(GOLDEN.parent / folder)
    code, text = convert(out, *flags.split())
    for name in [name for name in sys.modules if name.split(".")[0] in ("aclruntime", "ais_bench", "stand_in_aclruntime")]:
        monkeypatch.delitem(sys.modules, name)
    assert code == 0 and "OM verified" in text, text


def test_nan_climbs_too(out, cann, device):
    device["fp16"] = None
    assert convert(out)[0] == 0
    first = artifact.load(out).om["attempts"][0]
    assert not first["passed"] and "NaN" in first["error"]


def test_an_om_compiled_elsewhere_is_verified_later(out, cann, device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(om, "open_om", lambda *_: (_ for _ in ()).throw(ToolkitError("no device", MISSING_COMPONENT)))
        assert convert(out)[0] == 0 and artifact.load(out).status == artifact.OM_COMPILED
    monkeypatch.setenv("STAND_IN_ATC", "E19999 must not be started")
    device["fp16"] = 0.01
    code, text = convert(out)
    assert code == 0 and artifact.load(out).status == artifact.OM_VERIFIED, text


def test_an_om_that_turns_out_bad_is_taken_back(out, cann, device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(om, "open_om", lambda *_: (_ for _ in ()).throw(ToolkitError("no device", MISSING_COMPONENT)))
        assert convert(out, "--precision-mode", "fp16")[0] == 0
    assert convert(out, "--precision-mode", "fp16")[0] == 1
    assert artifact.load(out).status == artifact.ONNX_VERIFIED and not list(out.glob("*.om"))


# graphs made for ATC

@pytest.mark.parametrize("name", VISION_MODELS)
def test_graphs_for_atc_compute_the_same(converted, tmp_path, name):
    """Both changes at once; each alone is in `prepared`."""
    family, folder = family_of(GOLDEN / name), shutil.copytree(converted, tmp_path / "out")
    if family.directory != MODEL:
        code, text = convert(folder, "--force", model=family.directory)
        assert code == 0, text
    om.prepare(family, folder, Request("Ascend310P3", aipp=True, gears=(1, 2)))         # compares; a difference raises
    model = onnx.load(folder / atc.VARIANT, load_external_data=False)
    onnx.checker.check_model(str(folder / atc.VARIANT), full_check=True)
    known = json.loads(Path(atc.__file__).with_name("onnx_ops_cann.json").read_text())
    assert {node.op_type for node in model.graph.node} <= set(known) and "Shape" not in str(model.graph.node)
    [value] = model.graph.input
    _, height, width, channels = family.vision.input_shape
    shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    assert shape == ["batch", channels, height, width]


@pytest.mark.parametrize("name", VISION_MODELS)
def test_aipp_arithmetic(name):
    """In fp16, as the hardware computes, within 0.002 of the exact normalisation of every 8-bit value."""
    family = family_of(GOLDEN / name)
    _, normalize = variant.normalization(family)
    raw = np.repeat(np.arange(256, dtype=np.float32).reshape(1, 256, 1, 1), 3, axis=3)
    exact = ((raw / 255 - np.array(normalize.mean)) / np.array(normalize.std)).transpose(0, 3, 1, 2)
    config = variant.aipp_config(family)
    assert np.abs(variant.apply_aipp(config, raw, np.float64) - exact).max() < 1e-6
    assert np.abs(variant.apply_aipp(config, raw, np.float16) - exact).max() < 2e-3


def test_aipp_refuses_what_it_cannot_replace(monkeypatch):
    family = family_of(MODEL)
    monkeypatch.setattr(variant, "MAX_SIDE", 100)
    with pytest.raises(ToolkitError, match="leave --aipp out"):
        variant.aipp_config(family)


def test_weights_above_the_limit_of_a_part_go_beside_the_om(monkeypatch):
    family = family_of(MODEL)
    monkeypatch.setattr(atc, "OM_PART_BYTES", atc.weight_bytes(family, "origin") - 1)
    assert "external_weight" not in atc.options(Request("Ascend910B3"), family, "fp16")
    assert atc.options(Request("Ascend910B3"), family, "origin")["external_weight"] == "1"


# the stand-in refuses what the documentation says, on its own

@pytest.mark.parametrize("change, code", [
    ({"model": None}, "E10054"), ({"framework": None}, "E10007"), ({"model": "../nothing.onnx"}, "E10410"),
    ({"input_format": "NHWC"}, "E10001"), ({"precision_mode": "force_fp16"}, "E10056"), ({"log": "loud"}, "E10001"),
    ({"soc_version": "Ascend123"}, "E10001"), ({"output": "x/"}, "E10022"), ({"input_shape": "inptu:1,224,224,3"}, "E10016"),
    ({"input_shape": "input:1,224,224"}, "E10049"), ({"input_shape": "input:2,224,224,3"}, "E10050"),
    ({"dynamic_batch_size": "1,2"}, "E10040"), ({"dynamic_batch_size": "1,2", "dynamic_dims": "1;2"}, "E10009"),
    ({"dynamic_batch_size": "1,2", "input_shape": "input:-1,224,224,3"}, "E10018"),
    ({"modify_mixlist": "../manifest.json"}, "E10001"), ({"device": "0"}, "unknown command line flag 'device'"),
    ({"jit_compile": "1"}, "unknown command line flag 'jit_compile'"), ({"input_fp16_nodes": "x"}, "E10016"),
])
def test_the_stand_in_enforces_the_grammar(prepared, monkeypatch, capfd, change, code):
    monkeypatch.chdir(prepared[False, False] / atc.WORK)
    options = atc.options(Request("Ascend910B3"), family_of(MODEL), "fp16") | change
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    assert stand_in_atc.main(arguments, 8) == stand_in_atc.FAILED
    said = capfd.readouterr()
    assert code in said.out + said.err and "ATC run failed" in said.out
