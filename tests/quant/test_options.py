"""What `python -m quant` keeps in float by itself, and what a tired engineer gets wrong on its
command line."""

import json
import shutil
from importlib.util import find_spec
from itertools import chain

import paths
import pytest

from models import family_of
from models.errors import ModelError
from quant import msmodelslim_calls, pipeline
from quant.__main__ import main
from quant.calibration.samples import calibration_lines
from quant.layer_module import linear_groups
from quant.msmodelslim_calls import import_msmodelslim
from quant.recipe import kept_by_group, kept_by_range, num_widest, recipe_for, whole_groups
from runtime.common.errors import CHECK_FAILED, ToolkitError

pytestmark = pytest.mark.skipif(
    find_spec("msmodelslim") is None, reason="needs msmodelslim: pip install 'ascend-vlm[quant]'"
)

GOLDEN = paths.GOLDEN
GLM = GOLDEN / "msmodelslim" / "float" / "glm_f16"


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    file = tmp_path_factory.mktemp("calib") / "ids.jsonl"
    file.write_text("".join(json.dumps({"ids": [5, 6, 7 + i]}) + "\n" for i in range(4)))
    return str(file)


def quantise(out, *arguments, model=GLM):
    return main(["--model", str(model), "--out", str(out), *arguments])


# recipes


def test_widest_inputs_stay_float_with_their_siblings():
    family = family_of(GLM)
    names = list(chain.from_iterable(linear_groups(family).values()))
    ranges = {name: float(i) for i, name in enumerate(names)} | {
        "model.layers.1.self_attn.k_proj": 99.0
    }
    kept = kept_by_range(family, ranges, 1, set())
    assert (
        kept == {f"model.layers.1.self_attn.{n}_proj" for n in "qkv"} == whole_groups(family, kept)
    )


def test_published_recipe_of_glm4():
    """L25 of 160 layers; sparse weights in attention.dense alone."""
    family = family_of(GOLDEN / "glm4")
    assert num_widest(None, recipe_for(family, "w8a8").share, family) == round(
        25 / 160 * len(linear_groups(family))
    )
    kept = kept_by_group(family, recipe_for(family, "w8a8s").float_groups)
    quantised = set(chain.from_iterable(linear_groups(family).values())) - kept
    assert {name.rpartition(".")[2] for name in quantised} == {"dense"}


# mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--keep-float", "layers.0.nothing"],
            "--keep-float layers.0.nothing names no linear layer; they are called like",
        ),
        (["--disable-level", "25"], "--disable-level is '25': use L and a number"),
        (["--act-method", "4"], "use 1, 2 or 3"),
        (
            ["--scheme", "w8a8sc"],
            "w8a8sc is w8a8s compressed for the 310P: run .* python -m quant compress",
        ),
        (["--scheme", "w4a4"], "--scheme is 'w4a4': use one of w8a8"),
        (
            ["--scheme", "w8a8s", "--act-method", "3"],
            "--act-method 3 is not possible with --scheme w8a8s",
        ),
        (["--fraction", "0.5"], "from 0.01 to 0.1 is possible"),
        (["--max-kl", "0"], "more than 0 is needed"),
        (["--anti", "m9"], "--anti is 'm9': use one of m1"),
    ],
)
def test_mistakes(arguments, message, calib, tmp_path):
    with pytest.raises(ToolkitError, match=message):
        quantise(tmp_path, "--calib", calib, *arguments)


def test_float_weights_in_the_output_folder(calib, tmp_path):
    shutil.copy(GLM / "model.safetensors", tmp_path)
    with pytest.raises(
        ToolkitError, match="holds other weights \\(model.safetensors\\); give an empty folder"
    ):
        quantise(tmp_path, "--calib", calib)


def test_model_as_output_folder(calib):
    with pytest.raises(ToolkitError, match="holds other weights"):
        quantise(GLM, "--calib", calib)


def test_quantised_model_as_input(tmp_path):
    with pytest.raises(ToolkitError, match="is quantised already"):
        quantise(tmp_path, model=GOLDEN / "msmodelslim" / "glm_f16_w8a8")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is empty"),
        (b"not json", "line 1: no JSON"),
        (b'{"prompt": "x"}', "line 1: it is no calibration line"),
        (b'{"text": "x"}\n{"text": 5}', "line 2: it is no"),
        (b'{"messages": []}', "line 1: its messages ask nothing"),
        (b'{"ids": ["a"]}', "is no"),
        (
            b'{"messages": [{"role": "assistant", "content": "x"}]}',
            "line 1: its messages ask nothing",
        ),
        ("描述".encode("gbk"), "is not UTF-8"),
    ],
)
def test_bad_calibration_file(text, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text)
    with pytest.raises(ToolkitError, match=message):
        quantise(tmp_path / "out", "--calib", str(file))


def test_calibration_file_missing(tmp_path):
    with pytest.raises(ToolkitError, match="--calib is .*: there is no such file"):
        quantise(tmp_path / "out", "--calib", str(tmp_path / "none.jsonl"))


def test_lines_as_windows_and_databases_write_them(tmp_path):
    file = tmp_path / "lines.jsonl"
    text = '\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": null, "messages": [{"role": "user", "content": "c"}]}'
    file.write_bytes(text.encode())
    assert len(calibration_lines(str(file))) == 2


def test_token_id_outside_the_vocabulary(tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_text('{"ids": [1, 2, 900]}')
    with pytest.raises(ModelError, match="token id 900 is outside the vocabulary of 256"):
        quantise(tmp_path / "out", "--calib", str(file))


def test_disk_too_small(calib, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pipeline.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000)
    )
    with pytest.raises(ToolkitError, match="needs about 0.0 GB, its disk has 0.0 GB free"):
        quantise(tmp_path, "--calib", calib)


def test_fraction_of_narrow_layers(calib, tmp_path):
    """msmodelslim ends in an IndexError: one hundredth of 64 columns is no column."""
    with pytest.raises(
        ToolkitError, match="--fraction 0.01 of the 64 columns of .* use --fraction"
    ):
        quantise(tmp_path / "out", "--scheme", "w8a8s", model=GOLDEN / "glm_edge")


def test_msmodelslim_that_fails(calib, tmp_path, monkeypatch):
    """One sentence with its last message, exit code 1."""

    def fail(*rest, **settings):
        raise IndexError("index -1 is out of bounds")

    import_msmodelslim()
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator

    monkeypatch.setattr(Calibrator, "run", fail)
    with pytest.raises(ToolkitError, match=r"in the layer of .*q_proj \(IndexError: index -1") as e:
        quantise(tmp_path / "out", "--calib", calib)
    assert e.value.exit_code == CHECK_FAILED


@pytest.mark.parametrize(
    "message, line",
    [
        (
            "/env/torch.libs/libgomp-d22c30c5.so.1: cannot allocate memory in static TLS block",
            "export LD_PRELOAD=/env/torch.libs/libgomp-d22c30c5.so.1",
        ),
        ("cannot allocate memory in static TLS block", "export LD_PRELOAD=/usr/lib.*/libgomp.so.1"),
        ("No module named 'pandas'", "pip install"),
    ],
)
def test_import_that_fails_names_its_cure(message, line, monkeypatch):
    def fail(name):
        raise ImportError(message)

    monkeypatch.setattr(msmodelslim_calls.importlib, "import_module", fail)
    with pytest.raises(ToolkitError, match=f"run: {line}"):
        msmodelslim_calls._import_quietly()
