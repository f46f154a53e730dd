"""ATC's options: a table of good and bad `convert` invocations, run on a stand-in `atc` (stand_in_atc.py), which enforces
the documented grammar and compiles nothing; and that stand-in's own refusals.
"""

import os
import shlex
import shutil
from pathlib import Path

import paths
import pytest
import stand_in_atc
from atc_tools import MODEL, convert, install

from convert.atc.command import ATC_WORK, OmRequest, atc_options
from convert.atc.run import InstalledAtc, find_atc
from models import family_of

pytest_plugins = ["atc_fixtures"]
pytestmark = pytest.mark.usefixtures("surroundings")

# the table: flags, and what the atc command must hold or leave out (!), or the refusal

GOOD = [
    (
        "",
        "--model=../vision.onnx --framework=5 --output=vision --soc_version=Ascend910B3 --precision_mode_v2=fp16 "
        "--input_shape=input:1,224,224,3 --input_fp16_nodes=input --output_type=FP16 --input_format=NCHW",
    ),
    ("--soc-version Ascend310P3", "--soc_version=Ascend310P3 --precision_mode_v2=fp16"),
    ("--soc_version Ascend910B4-1", "--soc_version=Ascend910B4-1"),
    ("--soc-version Ascend910_9382", "--soc_version=Ascend910_9382"),
    ("--precision-mode origin", "--precision_mode_v2=origin !--modify_mixlist"),
    (
        "--precision-mode mixed_float16",
        "--precision_mode_v2=mixed_float16 --modify_mixlist=../vision_mixlist.json",
    ),
    ("--precision-mode mixed_bfloat16", "--precision_mode_v2=mixed_bfloat16"),
    ("--precision-mode cube_fp16in_fp32out", "--precision_mode_v2=cube_fp16in_fp32out"),
    (
        "--precision-mode must_keep_origin_dtype",
        "--precision_mode=must_keep_origin_dtype !--precision_mode_v2",
    ),
    (
        "--precision-mode allow_mix_precision",
        "--precision_mode=allow_mix_precision --modify_mixlist",
    ),
    (
        "--dynamic-batch 1,2,4,8",
        "--model=../vision_atc.onnx --dynamic_batch_size=1,2,4,8 --input_shape=input:-1,224,224,3",
    ),
    ("--dynamic-batch 4,1", "--dynamic_batch_size=1,4"),
    (
        "--aipp",
        "--model=../vision_atc.onnx --insert_op_conf=../vision_aipp.cfg --input_shape=input:1,3,224,224 "
        "!--input_fp16_nodes",
    ),
    (
        "--aipp --dynamic-batch 1,2",
        "--insert_op_conf=../vision_aipp.cfg --input_shape=input:-1,3,224,224 "
        "--dynamic_batch_size=1,2",
    ),
    ("--atc-arg log=info", "--log=info !--log=error"),
    ("--atc-arg=--log=debug", "--log=debug"),
    ("--atc-arg output_type=FP32", "--output_type=FP32 !--output_type=FP16"),
    ("--atc-arg external-weight=1", "--external_weight=1"),
    (
        "--atc-arg op_select_implmode=high_performance --atc-arg optypelist_for_implmode=Gelu,Sigmoid",
        "--op_select_implmode=high_performance --optypelist_for_implmode=Gelu,Sigmoid",
    ),
    ("--atc-arg keep_dtype={file}", "--keep_dtype={file}"),
    (
        "--precision-mode mixed_float16 --atc-arg modify_mixlist={file}",
        "--modify_mixlist={file} !--modify_mixlist=../vision_mixlist.json",
    ),
    ("--atc-arg input_format=ND", "--input_format=ND"),
    (
        "--atc-arg buffer_optimize=off_optimize --atc-arg deterministic=1",
        "--buffer_optimize=off_optimize --deterministic=1",
    ),
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
    ("--atc-arg dynamic_dims=1;2", "use --gears"),
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
    (
        "--atc-arg optypelist_for_implmode=Gelu --atc-arg op_select_implmode=high_precision_for_all",
        "op_select_implmode",
    ),
    ("--atc-arg deterministic_level=1", "both"),
    ("--atc-arg compress_weight_conf={file} --atc-arg enable_compress_weight=true", "exclude"),
    (
        "--precision-mode origin --atc-arg compression_optimize_conf={file}",
        "compression_optimize_conf",
    ),
    ("--atc-arg", "expected one argument"),
]


TABLE_HEAD = (
    "Written by tests/convert/test_atc_command.py, which also runs every good line on a stand-in for atc and checks "
    "that a bad one ends\nwith exit code 2. All for VisualGLM's tiny test checkpoint, without CANN, as "
    "`python -m convert --model DIR --out DIR\n--dry-run FLAGS` answers."
)


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
    monkeypatch.chdir(prepared["--aipp" in flags, "--dynamic-batch" in flags] / ATC_WORK)
    assert stand_in_atc.main(arguments[1:], 8) == 0, capsys.readouterr().out
    assert (Path.cwd() / "vision.om").is_file()
    shutil.rmtree("weight", ignore_errors=True)


@pytest.mark.parametrize("flags, says", BAD, ids=[flags[:60] for flags, _ in BAD])
def test_bad_invocations(tmp_path, flags, says):
    file = tmp_path / "list.json"
    file.write_text("{}")
    code, text = convert(
        tmp_path / "out", "--dry-run", *shlex.split(flags.format(file=file).replace(";", "\\;"))
    )
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
    lines = [
        "# What convert makes of its flags",
        "",
        TABLE_HEAD,
        "",
        "No flags: `" + " ".join(usual) + "`",
        "",
        "| flags | options of atc that differ |",
        "|---|---|",
    ]
    for flags, _ in GOOD[1:]:
        words = run(flags.format(file="list.json"))[1].split()
        lines.append(
            f"| `{flags.format(file='list.json')}` | `{' '.join(w for w in words if w not in usual)}` |"
        )
    lines += ["", "| flags | refusal |", "|---|---|"]
    for flags, _ in BAD:
        shown = flags.format(file="list.json")
        lines.append(
            f"| `{shown if len(shown) < 90 else shown[:50] + '...'}` | {run(shown)[1].removeprefix('error: ')} |"
        )
    page = paths.ROOT / "docs" / "atc-invocations.md"
    text = "\n".join(lines) + "\n"
    if os.environ.get("REFRESH_DOCS"):
        page.write_text(text, encoding="utf-8")
    refresh = (
        "REFRESH_DOCS=1 python -m pytest tests/convert/test_atc_command.py, then read the diff"
    )
    assert page.read_text(encoding="utf-8") == text, refresh


# which CANN


@pytest.mark.parametrize(
    "version, flags, says",
    [
        ("8.0.RC2", "--atc-arg external_weight=2", "needs CANN 9.0, installed is 8.0.RC2"),
        ("8.5.0", "--atc-arg jit_compile=2", "needs CANN 9.0"),
        ("8.3.RC1", "--soc-version Ascend950PR_9589 --precision-mode mixed_hif8", "needs CANN 9.0"),
        ("6.3.RC2", "", "install CANN 7.0"),
    ],
)
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
    assert find_atc() is None
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    assert find_atc() == InstalledAtc(tool, "7.0.1")


def test_an_unknown_cann_version_is_said(tmp_path, monkeypatch):
    install(tmp_path / "cann", monkeypatch, None)
    code, text = convert(tmp_path / "out", "--dry-run")
    assert code == 0 and "CANN of unknown version" in text


# the stand-in refuses what the documentation says, on its own


@pytest.mark.parametrize(
    "change, code",
    [
        ({"model": None}, "E10054"),
        ({"framework": None}, "E10007"),
        ({"model": "../nothing.onnx"}, "E10410"),
        ({"input_format": "NHWC"}, "E10001"),
        ({"precision_mode": "force_fp16"}, "E10056"),
        ({"log": "loud"}, "E10001"),
        ({"soc_version": "Ascend123"}, "E10001"),
        ({"output": "x/"}, "E10022"),
        ({"input_shape": "inptu:1,224,224,3"}, "E10016"),
        ({"input_shape": "input:1,224,224"}, "E10049"),
        ({"input_shape": "input:2,224,224,3"}, "E10050"),
        ({"dynamic_batch_size": "1,2"}, "E10040"),
        ({"dynamic_batch_size": "1,2", "dynamic_dims": "1;2"}, "E10009"),
        ({"dynamic_batch_size": "1,2", "input_shape": "input:-1,224,224,3"}, "E10018"),
        ({"modify_mixlist": "../manifest.json"}, "E10001"),
        ({"device": "0"}, "unknown command line flag 'device'"),
        ({"jit_compile": "1"}, "unknown command line flag 'jit_compile'"),
        ({"input_fp16_nodes": "x"}, "E10016"),
    ],
)
def test_the_stand_in_enforces_the_grammar(prepared, monkeypatch, capfd, change, code):
    monkeypatch.chdir(prepared[False, False] / ATC_WORK)
    options = atc_options(OmRequest("Ascend910B3"), family_of(MODEL), "fp16") | change
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    assert stand_in_atc.main(arguments, 8) == stand_in_atc.FAILED
    said = capfd.readouterr()
    assert code in said.out + said.err and "ATC run failed" in said.out
