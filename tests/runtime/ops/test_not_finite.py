"""NaN and Inf: no form of weights or activations swallows them, and they end one request alone."""

import shutil

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file

from models.checkpoint.quantized import Quantized
from runtime import Engine, SamplingParams
from runtime.common.errors import ToolkitError
from runtime.ops.cpu import native, native_library
from runtime.ops.cpu.ops import CpuOps
from runtime.ops.cpu.packed_weights import Int4Weight, Int8Weight
from runtime.ops.reference import ReferenceOps

BAD = [float("nan"), float("inf"), -float("inf")]
SMALL = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
DAMAGED = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"


def layer(form: str, ops):
    """A layer [32, 128] of one form as a function of x."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    if form in ("int8", "int4"):
        kind = {"int8": Int8Weight, "int4": Int4Weight}[form]
        packed = kind.from_tensors(kind.tensors(weight))
        return lambda x: packed(x, None)
    static = form == "static"
    quantized = Quantized(
        "W8A8" if static else "W8A8_DYNAMIC",
        (weight * 40).round().clamp(-128, 127).to(torch.int8),
        torch.full((32,), 0.02),
        torch.zeros(32, dtype=torch.int32) if static else None,
        *((0.05, 3) if static else ()),
    )
    made = ops.pack_quantized(quantized, torch.bfloat16)
    return lambda x: ops.quantized_linear(x, made)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", ["int8", "int4", "static", "dynamic"])
@pytest.mark.parametrize("ops", [CpuOps(), ReferenceOps()], ids=["cpu", "reference"])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_bad_token_shows_and_the_others_stay(form, ops, rows, bad):
    compute = layer(form, ops)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = compute(x.clone())
    x[1, 77] = bad
    found = compute(x)
    assert not found[1].isfinite().any()
    others = [row for row in range(rows) if row != 1]
    torch.testing.assert_close(found[others], wanted[others])


@pytest.mark.skipif(native_library.kernels() is None, reason="no kernels on this machine")
@pytest.mark.parametrize("bad", BAD)
def test_swiglu_of_the_kernels(bad):
    x = torch.ones(2, 64).bfloat16()
    x[1, 5] = bad if bad > 0 or bad != bad else float("nan")
    y = native.swiglu(x)
    assert y[0].isfinite().all() and not y[1, 5].isfinite()


# whole models


def damaged(folder, name: str = DAMAGED, value: float = float("nan")):
    """The golden GLM-4 with one bad value in one tensor."""
    shutil.copytree(GOLDEN / "glm4", folder, ignore=shutil.ignore_patterns("hf", "*.npz"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("value", BAD)
def test_packing_names_the_tensor_and_leaves_nothing(form, value, tmp_path, cache):
    folder = damaged(tmp_path / "model", value=value)
    for _ in range(2):
        with pytest.raises(ToolkitError, match=f"^{DAMAGED} in the checkpoint holds NaN or Inf; "):
            Engine(folder, cpu_weights=form, max_model_len=64)


def test_a_quantised_folder_names_the_tensor(tmp_path):
    source = GOLDEN / "msmodelslim" / "glm_f16_w8a8"
    shutil.copytree(source, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(file)
        name = next((each for each in sorted(tensors) if each.endswith("deq_scale")), None)
        if name:
            break
    if tensors[name].is_floating_point():
        tensors[name].view(-1)[0] = float("nan")
    else:  # float32 as the bits of a whole number
        tensors[name].view(-1)[0] = 0x7FC00000
    save_file(tensors, file, metadata={"format": "pt"})
    for record in (tmp_path / "model").glob("*sha256*"):
        record.unlink()
    with pytest.raises(ToolkitError, match="deq_scale in the checkpoint holds NaN or Inf"):
        Engine(tmp_path / "model", max_model_len=64)


def test_one_request_ends_and_the_others_go_on(tmp_path):
    """An embedding row with NaN: only who writes that token meets it."""
    name = "transformer.embedding.word_embeddings.weight"
    folder = tmp_path / "model"
    damaged(folder, name)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0] = load_file(GOLDEN / "glm4" / "model.safetensors")[name][0]
    tensors[name][9, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = Engine(folder, dtype="bfloat16", max_model_len=64)
    bad = engine.add(engine.prompt_from_ids([5, 9, 7]), SMALL)
    good = engine.add(engine.prompt_from_ids([5, 8, 7]), SMALL)
    while engine.busy:
        engine.step()
    assert bad.result.finish_reason == "error" and "NaN or Inf" in str(bad.error)
    assert good.result.finish_reason == "length" and len(good.result.token_ids) == 3
    whole = Engine(GOLDEN / "glm4", dtype="bfloat16", max_model_len=64)
    [wanted] = whole.generate([whole.prompt_from_ids([5, 8, 7])], SMALL)
    assert good.result.token_ids == wanted.token_ids
