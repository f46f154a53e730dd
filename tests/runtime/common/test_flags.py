"""Flags and Python options: spellings, defaults, falsy values kept, and one sentence for every mistake."""

import math
from dataclasses import fields

import pytest

from runtime.chat import ChatOptions
from runtime.chat import parser as chat_parser
from runtime.common.errors import ToolkitError, run_command
from runtime.common.flags import Parser, flag, kebab
from runtime.compare.__main__ import parser as compare_parser
from runtime.compare.options import CompareOptions
from runtime.engine.options import EngineOptions, SamplingParams


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("fp32", "float32"),
        ("float", "float32"),
        ("bf16", "bfloat16"),
        ("half", "float16"),
        ("float16", "float16"),
        ("auto", "auto"),
    ],
)
def test_dtype_spellings(spelling, name):
    assert EngineOptions(dtype=spelling).dtype == name


def test_npu_without_number_is_the_first():
    assert EngineOptions(device="npu").device == "npu:0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"device": "gpu"},
        {"device": "npu:x"},
        {"vision": "tensorrt"},
        {"ops": "fast"},
        {"block_size": 0},
        {"max_model_len": 0},
    ],
)
def test_engine_options_refuse(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ToolkitError, match=f"--{name.replace('_', '-')} is {value!r}"):
        EngineOptions(**wrong)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="quantize"):
        EngineOptions(quantize=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"seed": -1},
        {"seed": 2**63},
        {"min_p": 1.1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": math.nan},
    ],
)
def test_sampling_refuses(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(
        ToolkitError, match=f"--{name.replace('_', '-')} is {value!r}: .*needed|use a whole number"
    ):
        SamplingParams(**wrong)


def test_falsy_values_are_values(tmp_path):
    given = ["--temperature", "0", "--seed", "0", "--top-k", "0"]
    *_, sampling = chat_parser().parse(["--model", str(tmp_path), *given])
    assert (sampling.temperature, sampling.seed, sampling.top_k) == (0.0, 0, 0)
    assert sampling.temperature is not None and SamplingParams().temperature is None


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)


@pytest.mark.parametrize("spelling", ["--model", "-m", "--model-path", "--model_path"])
def test_model_spellings(spelling, tmp_path):
    options, *_ = chat_parser().parse([spelling, str(tmp_path)])
    assert options.model == str(tmp_path)


def test_users_spellings(tmp_path):
    argv = [
        "--model_path",
        str(tmp_path),
        "--input_image",
        "a_b.png",
        "--input-image=c_d.png",
        "--temp=0.5",
        "--top_p",
        "0.9",
        "--max_tokens",
        "7",
        "--device_id",
        "3",
        "--dtype",
        "fp16",
        "--prompt",
        "two words",
    ]
    options, engine, sampling = chat_parser().parse(argv)
    assert options.image == ("a_b.png", "c_d.png") and options.prompt == "two words"
    assert (engine.device, engine.dtype) == ("npu:3", "float16")
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 7)


def test_underscores_of_values_stay():
    assert kebab("--out_dir=a_b") == "--out-dir=a_b"
    assert [kebab(a) for a in ("a_b", "-", "-x_y")] == ["a_b", "-", "-x_y"]
    assert kebab("-trust_remote_code") == "--trust-remote-code"  # as MindIE's guides write it


def test_what_is_not_given_is_left_to_the_dataclass(tmp_path):
    options, engine = compare_parser().parse(["-m", str(tmp_path), "--out", "o"])
    assert engine == EngineOptions()
    assert options == CompareOptions(model=str(tmp_path), out="o")
    assert options.reference == str(tmp_path) and options.threshold is None


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "required: -m/--model"),
        (["--max-token", "3"], "did you mean --max-tokens"),
        (["--lora_path=x"], "merge the adapter into the checkpoint"),
        (["more"], "argument more"),
        (["--max-tokens", "many"], "invalid int value: 'many'"),
        (["--model"], "expected one argument"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--language", "fr"], "use one of zh, en"),
    ],
)
def test_mistakes_on_the_command_line(argv, sentence, tmp_path, capsys):
    model = [] if not argv or argv == ["--model"] else ["--model", str(tmp_path)]
    assert run_command(lambda a: chat_parser().parse(a) and 0, model + argv) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1 and shown.startswith("error: ")


@pytest.mark.parametrize(
    ("threshold", "tokens", "prompt"), [(0, 1, "x"), (1.5, 1, "x"), (0.9, 0, "x"), (0.9, 1, "  ")]
)
def test_compare_refuses(threshold, tokens, prompt, tmp_path):
    with pytest.raises(ToolkitError):
        CompareOptions(
            model=str(tmp_path), out="o", threshold=threshold, max_tokens=tokens, prompt=[prompt]
        )


def test_a_model_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ToolkitError, match="--model .* is a file"):
        ChatOptions(model=str(tmp_path / "file"))
    with pytest.raises(ToolkitError, match="--reference .* does not exist"):
        CompareOptions(model=str(tmp_path), out="o", reference="THUDM/visualglm-6b")


def test_trust_remote_code_is_noted_and_ignored(tmp_path, capsys):
    chat_parser().parse(["--model", str(tmp_path), "--trust_remote_code"])
    assert "ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "groups", [(ChatOptions, EngineOptions, SamplingParams), (CompareOptions, EngineOptions)]
)
def test_every_flag_is_declared_once(groups):
    names = [f.name for options in groups for f in fields(options) if f.metadata]
    assert len(names) == len(set(names))


def test_a_field_without_default_is_required():
    from dataclasses import dataclass

    @dataclass
    class Options:
        size: int = flag("how large", kind=int)

    parser = Parser("python -m x", "--size N", "Does x.", {"options": Options})
    assert parser.parse(["--size", "3"]) == [Options(3)]
    with pytest.raises(ToolkitError, match="--size; see python -m x --help"):
        parser.parse([])
