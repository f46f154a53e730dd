"""One layer of a quantised folder with a wrong scale of 1 %, of one channel too, a wrong offset or a
changed weight: it fails the comparison and is named."""

import shutil

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint.quantized import float_scale
from runtime.compare.layers.scales import judge_scales

SLIM = paths.GOLDEN / "msmodelslim"
FLOAT = SLIM / "float" / "glm_f16"
# folder -> scales that its arithmetic reads; with weight_scale beside them it needs no reference
STATIC = {
    "glm_bf16_w8a8": True,
    "glm_f16_cli_v1_w8a8_static": False,
    "glm_f16_w8a8": True,
    "glm_f16_w8a8_m4": True,
    "glm_f16_w8a8s": False,
    "llama_f16_w8a8_m4": True,
}
FOLDERS = (*STATIC, "glm_f16_w8a8_dynamic")
LAYER = "model.layers.1.self_attn.o_proj"


def changed(folder, out, tensor, change):
    """A copy of the golden folder with one tensor of LAYER changed."""
    shutil.copytree(SLIM / folder, out)
    name = f"{LAYER}.{tensor}"
    for file in out.glob("*.safetensors"):
        tensors = {key: value.clone() for key, value in load_file(file).items()}
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, file)
            return out
    raise AssertionError(f"{folder} has no {name}")


def times(factor, rows=slice(None)):
    """A function that multiplies (rows of) a scale, in the form in which it is stored."""

    def change(tensor):
        values = float_scale(tensor).clone()
        values[rows] *= factor
        if tensor.dtype == torch.int64:
            return values.view(torch.int32).to(torch.int64)
        return values.to(tensor.dtype)

    return change


def scale_of(folder):
    return "deq_scale" if folder in STATIC else "weight_scale"


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_folders_fit(folder):
    found = judge_scales(SLIM / folder, FLOAT)
    assert not found["failed"] and not found["unjudged"] and found["judged"] >= 12


@pytest.mark.parametrize("factor", [1.01, 0.99, 1.05, float("nan")])
@pytest.mark.parametrize("folder", FOLDERS)
def test_wrong_scale_is_named(folder, factor, tmp_path):
    damaged = changed(folder, tmp_path / "m", scale_of(folder), times(factor))
    (fault,) = judge_scales(damaged, FLOAT)["failed"]
    assert fault["layer"] == LAYER
    own = STATIC.get(folder, False)
    failed = judge_scales(damaged, damaged)["failed"]
    assert [fault["layer"] for fault in failed] == ([LAYER] if own else [])


@pytest.mark.parametrize("folder", ["glm_bf16_w8a8", "glm_f16_w8a8", "glm_f16_w8a8_m4"])
@pytest.mark.parametrize("tensor", ["input_scale", "weight_scale"])
def test_scales_that_do_not_belong_together(folder, tensor, tmp_path):
    """The product was not made of these factors."""
    damaged = changed(folder, tmp_path / "m", tensor, lambda scale: scale * 1.01)
    (fault,) = judge_scales(damaged, damaged)["failed"]
    assert fault["layer"] == LAYER


@pytest.mark.parametrize("factor", [1.01, 0.99])
@pytest.mark.parametrize("folder", FOLDERS)
def test_wrong_scale_of_one_channel(folder, factor, tmp_path):
    if folder == "glm_f16_w8a8s" and factor > 1:
        factor = 1.05  # its weights have 4 bits: 1 % of a channel lies within their rounding
    damaged = changed(folder, tmp_path / "m", scale_of(folder), times(factor, slice(7, 8)))
    (fault,) = judge_scales(damaged, FLOAT)["failed"]
    assert (fault["layer"], fault["row"]) == (LAYER, 7)


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("folder", STATIC)
def test_wrong_zero_point(folder, step, tmp_path):
    """Of a layer without a bias; the reference is not needed."""
    damaged = changed(folder, tmp_path / "m", "input_offset", lambda offset: offset + step)
    for reference in (FLOAT, damaged):
        (fault,) = judge_scales(damaged, reference)["failed"]
        assert (fault["layer"], fault["measure"]) == (LAYER, "bias")


@pytest.mark.parametrize("change", ["one step", "sign bit"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_changed_weight(folder, change, tmp_path):
    """One int8 value. quant_bias holds the row's sum; dynamic layers need the reference."""

    def change_one(weight):
        weight = weight.clone()
        value = int(weight[7, 3])
        weight[7, 3] = value ^ -128 if change == "sign bit" else value - 1
        return weight

    damaged = changed(folder, tmp_path / "m", "weight", change_one)
    (fault,) = judge_scales(damaged, FLOAT)["failed"]
    assert (fault["layer"], fault["row"]) == (LAYER, 7)


def test_a_bias_that_is_not_stored_is_no_fault(tmp_path):
    """As anti-outlier methods that shift leave it: quant_bias alone has it."""
    damaged = changed(
        "glm_f16_w8a8",
        tmp_path / "m",
        "quant_bias",
        lambda bias: bias + torch.arange(len(bias)) * 7,
    )
    assert not judge_scales(damaged, FLOAT)["failed"]


@pytest.mark.parametrize("folder", ["glm_f16_w8a8", "glm_f16_w8a8_dynamic"])
def test_wrong_scale_of_one_row(folder, tmp_path):
    damaged = changed(folder, tmp_path / "m", scale_of(folder), times(1.05, slice(7, 8)))
    (fault,) = judge_scales(damaged, FLOAT)["failed"]
    assert fault["layer"] == LAYER and fault["row"] == 7


def test_wrong_offset(tmp_path):
    """quant_bias holds the offset; only layers with a float bias can say so."""
    shutil.copytree(SLIM / "glm_f16_w8a8", tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.0.self_attn.q_proj.input_offset"] += 1
    save_file(tensors, file)
    (fault,) = judge_scales(tmp_path / "m", FLOAT)["failed"]
    assert fault["layer"] == "model.layers.0.self_attn.q_proj" and fault["measure"] == "bias"


def test_rescaled_weights_are_not_judged_by_another_model(tmp_path):
    """Anti-outlier's weights are not the reference's: the folder's own scales judge them."""
    found = judge_scales(SLIM / "glm_f16_w8a8_m4", FLOAT)
    assert found["judged"] == 12 and not found["failed"]
    assert judge_scales(FLOAT, FLOAT) is None
