"""Options of the engine: the spellings of the guides, and what is refused."""

import paths
import pytest

from runtime.chat import main as chat
from runtime.common.devices import device_name
from runtime.common.errors import ToolkitError, run_command
from runtime.engine.options import EngineOptions


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("cpu", "cpu"),
        ("npu", "npu:0"),
        ("NPU:3", "npu:3"),
        ("0", "npu:0"),
        ("7", "npu:7"),
        (1, "npu:1"),
        ("cuda", "cuda:0"),
        ("cuda:01", "cuda:1"),
    ],
)
def test_names_of_devices(spelling, name):
    assert device_name(spelling) == name
    assert EngineOptions(device=spelling).device == name


@pytest.mark.parametrize(
    "spelling, sentence",
    [
        ("gcu", "gcu is a card of another vendor"),
        ("mlu:0", "mlu is a card of another vendor"),
        ("-1", "use cpu, npu, npu:N, cuda or cuda:N"),
        ("0,1", "a bare number N is npu:N"),
        ("npu:", "use cpu"),
        ("cpu:0", "use cpu"),
        ("", "use cpu"),
    ],
)
def test_devices_that_are_refused(spelling, sentence):
    with pytest.raises(ToolkitError, match=sentence):
        EngineOptions(device=spelling)


def test_a_bare_number_is_said_to_be_an_npu(capsys):
    argv = ["--model", str(paths.GOLDEN / "glm4"), "--prompt", "hi", "--device", "0"]
    assert run_command(chat, argv) == 3  # there is no NPU here
    assert "--device 0: taken as npu:0, the NPU of that number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "precision, field, value",
    [
        ("int4", "cpu_weights", "int4"),
        ("int8", "cpu_weights", "int8"),
        ("bfloat16", "dtype", "bfloat16"),
        ("float16", "dtype", "float16"),
    ],
)
def test_precision_is_another_name(precision, field, value):
    assert getattr(EngineOptions(precision=precision), field) == value


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"precision": "int3"}, "use one of int8, int4"),
        ({"precision": "int4", "cpu_weights": "int8"}, "give one of the two"),
        ({"precision": "float16", "dtype": "fp32"}, "--dtype is 'float32'"),
        ({"precision": "int4", "device": "0"}, "it needs --device cpu"),
    ],
)
def test_precisions_that_are_refused(options, sentence):
    with pytest.raises(ToolkitError, match=sentence):
        EngineOptions(**options)
