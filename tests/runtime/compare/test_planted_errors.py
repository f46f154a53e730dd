"""A planted error must fail the comparison and be named: weights, settings, operators and dtypes gone wrong, per family."""

import json
import re
import shutil

import numpy as np
import paths
import pytest
import torch
from damaged_checkpoints import edited

from models import family_of
from quant.options import GateOptions
from runtime import Engine
from runtime.common.errors import ToolkitError
from runtime.compare import __main__ as command
from runtime.compare.cases import choose_cases
from runtime.compare.comparison import compare
from runtime.compare.layers import layerwise as layers
from runtime.compare.limits import all_limits
from runtime.compare.options import CompareOptions
from runtime.compare.report import sentences
from runtime.engine.options import EngineOptions
from runtime.ops.cpu.ops import CpuOps

GOLDEN = paths.GOLDEN
FAMILIES = ("visualglm", "glm4", "glm4_0414", "glm4v", "llava", "glm_edge", "glm_edge_v")
BRANCH = {
    "attention_norm": "attention",
    "qkv": "attention",
    "out": "attention",
    "attention_post_norm": "attention",
    "mlp_norm": "mlp",
    "up": "mlp",
    "down": "mlp",
    "mlp_post_norm": "mlp",
}
TARGETS = (
    "layers.0.qkv",
    "layers.1.out",
    "layers.1.up",
    "layers.0.down",
    "layers.1.mlp_norm",
    "layers.0.attention_norm",
)
# in the place of the matrices before them, of which a norm takes the scale away
POST_NORMS = {
    "layers.1.out": "layers.1.attention_post_norm",
    "layers.0.down": "layers.0.mlp_post_norm",
}


def compared(
    model, tmp_path, reference=None, max_tokens=4, search=False, layer_by_layer=False, **engine
):
    """The findings of a short text question."""
    options = CompareOptions(
        model=str(model),
        reference=str(reference or model),
        out=str(tmp_path),
        prompt=["What is this?"],
        max_tokens=max_tokens,
        search=search,
        layer_by_layer=layer_by_layer,
    )
    settings = EngineOptions(
        **{"dtype": "float32", "vision": "torch", "max_model_len": 256} | engine
    )
    return compare(options, settings, choose_cases(options, family_of(model)), tmp_path)


def departed(found):
    """The stage that the verdict names."""
    assert not found["passed"]
    check = next(c for c in found["checks"] if c["stage"] == "layers")
    assert not check["passed"] and check["worst"]["stage"] in found["verdict"]
    return check["worst"]["stage"]


def sources(family, target):
    """Checkpoint names of one of our decoder tensors."""
    return [w.source for w in family.weights() for p in w.parts if str(p.target) == target]


def scale(name, factor=1.01):
    def edit(tensors):
        if name in tensors:
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return edit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_clean_candidates_pass(family, dtype, tmp_path):
    found = compared(GOLDEN / family, tmp_path, dtype=dtype)
    assert found["passed"], found["verdict"]
    assert [s["stage"] for s in found["layers"]][0 :: len(found["layers"]) - 1] == [
        "embed",
        "lm_head",
    ]
    assert len(found["layers"]) == 2 * family_of(GOLDEN / family).decoder.layers + 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_one_tensor_scaled(family, target, tmp_path):
    model = GOLDEN / family
    if family_of(model).decoder.post_norms:
        target = POST_NORMS.get(target, target)
    source = sources(family_of(model), target + ".weight")[-1]
    bad = edited(model, tmp_path, scale(source))
    _, index, part = target.split(".")
    assert departed(compared(bad, tmp_path, model)) == f"layers.{index}.{BRANCH[part]}"


@pytest.mark.parametrize(
    "target, stage",
    [("embed.weight", "embed"), ("final_norm.weight", "final_norm"), ("lm_head.weight", "lm_head")],
)
def test_ends_of_the_decoder_scaled(target, stage, tmp_path):
    model = GOLDEN / "glm4v"
    bad = edited(model, tmp_path, scale(sources(family_of(model), target)[0]))
    assert departed(compared(bad, tmp_path, model)) == stage


@pytest.mark.parametrize("target", ["layers.1.down", "layers.0.out", "layers.1.qkv"])
def test_one_tensor_scaled_under_bf16(target, tmp_path):
    """Below bf16's rounding error of a layer, but rounding has no direction."""
    model = GOLDEN / "llava"
    bad = edited(model, tmp_path, scale(sources(family_of(model), target + ".weight")[-1]))
    found = compared(bad, tmp_path, model, dtype="bfloat16")
    assert departed(found).startswith(target[:8])


@pytest.mark.parametrize(
    "family, key",
    [
        ("visualglm", "layernorm_epsilon"),
        ("glm4", "layernorm_epsilon"),
        ("glm4_0414", "rms_norm_eps"),
        ("glm4v", "layernorm_epsilon"),
        ("llava", "rms_norm_eps"),
        ("glm_edge", "rms_norm_eps"),
        ("glm_edge_v", "rms_norm_eps"),
    ],
)
def test_another_epsilon(family, key, tmp_path):
    bad = edited(GOLDEN / family, tmp_path, lambda tensors: None)
    config = json.loads((bad / "config.json").read_text())
    inner = config["text_config"] if family == "llava" else config
    inner[key] = inner.get(key, 1e-6) * 10
    (bad / "config.json").write_text(json.dumps(config))
    assert departed(compared(bad, tmp_path, GOLDEN / family)) == "layers.0.attention"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_activation(family, tmp_path, monkeypatch):
    """erf instead of tanh; and erf GELU where SiLU belongs."""

    def wrong(self, x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up

    monkeypatch.setattr(CpuOps, "gelu_tanh", lambda self, x: torch.nn.functional.gelu(x))
    monkeypatch.setattr(CpuOps, "swiglu", wrong)
    assert departed(compared(GOLDEN / family, tmp_path)) == "layers.0.mlp"


@pytest.mark.parametrize("family", FAMILIES)
def test_query_rows_swapped_in_one_head(family, tmp_path):
    model = GOLDEN / family
    source = sources(family_of(model), "layers.1.qkv.weight")[0]  # q, or q, k and v in one tensor

    def swap(tensors):
        if source in tensors:
            tensors[source][[0, 2]] = tensors[source][[2, 0]]

    assert (
        departed(compared(edited(model, tmp_path, swap), tmp_path, model)) == "layers.1.attention"
    )


def overflowing(family, tmp_path):
    """Fine in fp32; in fp16 the inner values of an MLP pass 65504, the residual stream does not."""
    table = family_of(GOLDEN / family)
    up, down = (sources(table, f"layers.1.{n}.weight") for n in ("up", "down"))

    def edit(tensors):
        for name, factor in [(up[-1], 3e5), (down[0], 1 / 3e5)]:
            if name in tensors:
                tensors[name] = tensors[name].float()
                ungated = slice(
                    -table.decoder.ffn if name == up[-1] else None, None
                )  # of a fused gate and up
                tensors[name][ungated] *= factor

    return edited(GOLDEN / family, tmp_path, edit)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_overflow(family, tmp_path):
    found = compared(overflowing(family, tmp_path), tmp_path, dtype="float16")
    assert departed(found) == "layers.1.mlp" and "NaN or Inf" in found["verdict"]


def test_search_for_what_must_stay_float32(tmp_path):
    """What it prints is taken by the next command, which passes."""
    bad = overflowing("glm_edge", tmp_path)
    assert compared(bad, tmp_path)["passed"]
    culprit = compared(bad, tmp_path, search=True, dtype="float16")["culprit"]
    assert culprit["flags"] == "--keep-dtype layers.1.mlp"
    found = compared(bad, tmp_path, dtype="float16", keep_dtype=[culprit["flags"].split()[1]])
    assert found["passed"], found["verdict"]


@pytest.mark.parametrize(
    "pattern, sentence",
    [("layers.9.mlp", "layers.0.attention to layers.2.mlp"), ("mlp", "names no stage")],
)
def test_keep_dtype_that_names_nothing(pattern, sentence):
    with pytest.raises(ToolkitError, match=sentence):
        Engine(GOLDEN / "glm_edge", dtype="bfloat16", keep_dtype=[pattern])


def quantised(model, tmp_path, damage=None, factor=2):
    """A W8A8_DYNAMIC folder as msmodelslim lays it out; the scales of the linear layer `damage` are
    `factor` times too large."""
    linears = {
        w.source for w in family_of(model).weights() for p in w.parts if layers_of(str(p.target))
    }
    kinds = {"model_quant_type": "W8A8_DYNAMIC"}

    def edit(tensors):
        for name in linears & tensors.keys():
            weight = tensors[name].float()
            base = name.removesuffix(".weight")
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors |= {
                name: (weight / scale).round().to(torch.int8),
                f"{base}.weight_offset": torch.zeros_like(scale),
                f"{base}.weight_scale": scale * (factor if name == damage else 1),
            }
        kinds.update(
            {
                name: "W8A8_DYNAMIC"
                if name.rpartition(".")[0] + ".weight" in linears and not name.endswith("bias")
                else "FLOAT"
                for name in tensors
            }
        )

    copy = edited(model, tmp_path, edit)
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    (copy / "quant_model_description.json").write_text(json.dumps(kinds))
    return copy


def layers_of(target):
    return re.fullmatch(r"layers\.\d+\.(qkv|out|up|down)\.weight", target)


@pytest.mark.parametrize("family", ["visualglm", "glm4v", "llava"])
def test_quantised_folders(family, tmp_path):
    """A clean one passes; one broken scale is named, and the search puts that layer back."""
    found = compared(quantised(GOLDEN / family, tmp_path), tmp_path, GOLDEN / family)
    assert (
        found["passed"]
        and len(found["layers"]) == 2 * family_of(GOLDEN / family).decoder.layers + 3
    ), found["verdict"]
    shutil.rmtree(tmp_path / "edited")
    victim = sources(family_of(GOLDEN / family), "layers.1.down.weight")[0]
    found = compared(
        quantised(GOLDEN / family, tmp_path, victim), tmp_path, GOLDEN / family, search=True
    )
    assert departed(found) == "layers.1.mlp"
    assert f"--keep-float {victim.removesuffix('.weight')}" in found["culprit"]["flags"]


@pytest.mark.parametrize("family", ["glm_edge", "glm4", "llava"])
def test_wrong_scale_of_one_percent(family, tmp_path):
    """It costs the logits less than the rounding does, and is named without --search."""
    model = GOLDEN / family
    victim = sources(family_of(model), "layers.1.down.weight")[0]
    found = compared(quantised(model, tmp_path, victim, 1.01), tmp_path, model)
    layer = victim.removesuffix(".weight")
    assert not found["passed"] and f"the scales of {layer} do not fit: 1.0" in found["verdict"]
    assert [fault["layer"] for fault in found["scales"]["failed"]] == [layer]
    assert layer in found["verdict_zh"]


def test_rule_of_a_quantised_model(tmp_path):
    """The gate's limits decide, not a cosine; the report says so."""
    found = compared(quantised(GOLDEN / "glm4", tmp_path), tmp_path, GOLDEN / "glm4")
    gate = GateOptions()
    limits = {c["measure"]: c["limit"] for c in found["checks"] if c["stage"] == "decode"}
    assert limits == {"kl_mean": gate.max_kl, "top1_agreement": gate.min_top1}
    assert "within the limits of python -m quant: KL" in found["verdict"]
    assert "scales of 12 int8 layers fit" in found["verdict"] and found["passed"]
    given = all_limits(0.95, [], True)
    assert given["decode"] == {"cosine_min": 0.95}


def test_verdict_of_a_quantised_model_with_pictures():
    """Its logits are not judged by their cosine, which is lower than that of the pictures."""
    vision = {"stage": "vision", "measure": "cosine_min", "value": 0.99999, "limit": 0.9999}
    decode = [
        {"stage": "decode", "measure": "kl_mean", "value": 0.01, "limit": 0.05},
        {"stage": "decode", "measure": "top1_agreement", "value": 0.95, "limit": 0.9},
    ]
    verdict = sentences.english(True, [vision, *decode])
    assert verdict.startswith("PASSED: no cosine of the vision features is below 0.9999; smallest")
    assert "within the limits of python -m quant" in verdict


@pytest.mark.parametrize("family", ["visualglm", "glm_edge", "glm4"])
def test_layer_by_layer(family, tmp_path):
    """The same logits with one layer of the weights in memory at a time."""
    model = quantised(GOLDEN / family, tmp_path) if family == "glm4" else GOLDEN / family
    whole, streamed = (
        Engine(model, dtype="float32", vision="torch", max_model_len=256, layer_by_layer=one)
        for one in (False, True)
    )
    prompt = whole.prompt([{"role": "user", "content": "What is this?"}])
    np.testing.assert_allclose(
        streamed.score(prompt, [5, 6, 7]), whole.score(prompt, [5, 6, 7]), rtol=1e-4, atol=1e-4
    )
    assert {name.split(".")[1] for name in streamed._current_layer.held} == {
        str(whole.family.decoder.layers - 1)
    }
    assert streamed.plan.weights < whole.plan.weights


def test_layer_by_layer_report(tmp_path):
    model = GOLDEN / "llava"
    bad = edited(model, tmp_path, scale(sources(family_of(model), "layers.1.down.weight")[0]))
    assert compared(model, tmp_path, dtype="bfloat16", max_tokens=20, layer_by_layer=True)["passed"]
    found = compared(bad, tmp_path, model, dtype="bfloat16", max_tokens=20, layer_by_layer=True)
    assert departed(found) == "layers.1.mlp" and found["stages"]["decode"]["rows"] == 20


def rounded(tensor, bits):
    """To a grid, as a bad quantisation does."""
    step = tensor.float().abs().max() / 2 ** (bits - 1)
    return ((tensor.float() / step).round() * step).to(tensor.dtype)


@pytest.mark.parametrize("family", ["glm_edge", "visualglm"])
def test_search_names_the_layers_that_must_stay_float(family, tmp_path, capsys):
    """All layers rounded to 11 bits, which passes, two linear layers to 3 bits, which does not."""
    model = GOLDEN / family
    table = family_of(model)
    coarse = [sources(table, f"layers.{target}.weight")[0] for target in ("0.down", "1.out")]
    fine = [sources(table, f"layers.{i}.up.weight")[0] for i in (0, 1)]

    def edit(tensors):
        for name in tensors.keys() & {*coarse, *fine}:
            tensors[name] = rounded(tensors[name], 3 if name in coarse else 11)

    argv = [
        "--model",
        str(edited(model, tmp_path, edit)),
        "--reference",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--vision",
        "torch",
        "--prompt",
        "What is this?",
        "--max-tokens",
        "4",
        "--threshold",
        "0.9999",
        "--search",
    ]
    assert command.main(argv) == 1
    culprit = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["culprit"]
    assert sorted(culprit["stages"]) == ["layers.0.mlp", "layers.1.attention"]
    assert all(
        f"--keep-float {name.removesuffix('.weight')}" in culprit["flags"] for name in coarse
    )
    assert "search: it passes with" in capsys.readouterr().out


def test_search_without_a_set_that_helps(tmp_path):
    model = GOLDEN / "glm4v"
    bad = edited(model, tmp_path, scale(sources(family_of(model), "lm_head.weight")[0], -1.0))
    options = CompareOptions(
        model=str(bad),
        reference=str(model),
        out=str(tmp_path),
        prompt=["x"],
        max_tokens=2,
        search=True,
    )
    settings = EngineOptions(dtype="float32", vision="torch", max_model_len=256)
    found = compare(options, settings, choose_cases(options, family_of(bad)), tmp_path)
    assert (
        found["culprit"]["stages"] == []
        and "no set of layers helps" in found["culprit"]["sentence"]
    )


def test_headroom_is_the_distance_to_the_largest_half(tmp_path):
    for stage in compared(GOLDEN / "glm4", tmp_path)["layers"]:
        assert stage["headroom"] == pytest.approx(layers.HALF_MAX / stage["largest"])
