"""`python -m quant` with the real msmodelslim: its numbers, its guards, its gate, and what a tired
engineer gets wrong."""

import json
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import paths
import pytest
import torch
from safetensors.torch import load_file

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import halves_of
from quant import gate, msmodelslim_calls, pipeline, plan
from quant.__main__ import main
from quant.layer_module import LayerModule, linear_groups
from quant.work_folder import WorkFolder
from runtime import Engine
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.common.files import CHECKSUMS
from runtime.compare.layers.scales import judge_scales

pytestmark = pytest.mark.skipif(
    find_spec("msmodelslim") is None, reason="needs msmodelslim: pip install 'ascend-vlm[quant]'"
)

GOLDEN = paths.GOLDEN
GLM = GOLDEN / "msmodelslim" / "float" / "glm_f16"
FAMILIES = (*paths.FAMILIES, "glm46v")
OPEN_GATE = ("--max-kl", "100", "--min-top1", "0")  # random weights: nobody expects quality of them
LAST_BIT = 2e-6  # of a float32 scale: msmodelslim's run adds up in another order


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Token ids for the golden GLM, whose tokenizer knows no chat: two thirds to calibrate on, the
    rest to judge."""
    torch.manual_seed(1)
    ids = [torch.randint(3, 256, (48,)).tolist() for _ in range(8)]
    file = tmp_path_factory.mktemp("calib") / "ids.jsonl"
    file.write_text("".join(json.dumps({"ids": line}) + "\n" for line in ids))
    return file, ids


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Questions and a conversation, as users write them."""
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
    lines = [
        {"text": "描述这张图片。"},
        {"inputs_pretokenized": "one, two, three"},
        {"messages": chat},
        {"text": "why?"},
    ]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def quantise(out, *arguments, model=GLM, lines=None):
    calibration = ["--calib", str(lines[0])] if lines else []
    folders = ["--model", str(model), "--out", str(out)]
    assert main([*folders, *OPEN_GATE, *calibration, *arguments]) == 0
    return tensors_of(out), json.loads((out / "quant_model_description.json").read_text())


def tensors_of(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# msmodelslim's own numbers


@pytest.fixture
def upstream(lines, tmp_path, monkeypatch):
    """upstream(anti, **QuantConfig fields) -> tensors that msmodelslim's whole-model run on
    transformers' model saves."""

    def run(anti=None, **settings):
        from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig
        from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
        from transformers import AutoModelForCausalLM

        msmodelslim_calls.import_msmodelslim()
        monkeypatch.chdir(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(GLM, dtype=torch.float32).eval()
        model.config.dtype = torch.float16
        calibrating = [ids for i, ids in enumerate(lines[1]) if i % 4 != 3]
        data = [
            [torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)] for ids in calibrating
        ]
        if anti:
            down = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
            AntiOutlier(
                model,
                calib_data=data,
                cfg=AntiOutlierConfig(anti_method=anti, disable_anti_names=down),
            ).process()
        calibrator = Calibrator(
            model, QuantConfig(dev_type="cpu", mm_tensor=False, pr=1.0, **settings), calib_data=data
        )
        calibrator.run()
        calibrator.save(str(tmp_path / "upstream"), save_type=["ascendV1"])
        return tensors_of(tmp_path / "upstream")

    return run


@pytest.mark.parametrize(
    "scheme, settings",
    [
        ("w8a8", {"w_bit": 8, "a_bit": 8, "act_method": 1}),
        ("w8a8s", {"w_bit": 4, "a_bit": 8, "act_method": 1, "is_lowbit": True, "fraction": 0.01}),
    ],
)
def test_layer_by_layer_equals_the_whole_model_run(scheme, settings, lines, upstream, tmp_path):
    """Weights bit for bit, scales of activations up to the last bit of the mean over samples."""
    arguments = ["--scheme", scheme, "--disable-level", "L0", "--act-method", "1"]
    ours, _ = quantise(tmp_path / "ours", *arguments, lines=lines)
    theirs = upstream(**settings)
    kept = {"qkv": "_proj", "up": "gate_up_proj", "down": "down_proj"} if scheme == "w8a8s" else {}
    names = [n for n in theirs if n in ours and theirs[n].dtype == ours[n].dtype and "layers." in n]
    assert any(n.endswith("o_proj.weight") for n in names) and (kept or len(names) > 70)
    for name in names:
        if name.endswith(("input_scale", "deq_scale")):
            scales = [slim_scale(t[name]) for t in (ours, theirs)]
            rounding = 2**-11 + LAST_BIT  # ours is made of the float16 that engines see
            torch.testing.assert_close(*scales, rtol=rounding if not kept else 0.1, atol=0)
        elif (
            name.endswith((".weight", "weight_scale", "weight_offset", "input_offset"))
            and ours[name].ndim == 2
        ):
            assert torch.equal(ours[name], theirs[name]), name
        elif name.endswith("quant_bias") and not kept:
            assert (ours[name] - theirs[name]).abs().max() <= 1, name


def slim_scale(tensor):
    return (
        tensor.to(torch.int32).view(torch.float32)
        if tensor.dtype == torch.int64
        else tensor.float()
    )


@pytest.mark.parametrize(
    "scheme, settings",
    [
        ("w8a8-dynamic", {"w_bit": 8, "a_bit": 8, "is_dynamic": True}),
        ("w8a16", {"w_bit": 8, "a_bit": 16}),
    ],
)
def test_schemes_without_samples_are_bit_equal(scheme, settings, lines, upstream, tmp_path):
    ours, kinds = quantise(tmp_path / "ours", "--scheme", scheme, lines=lines)
    theirs = upstream(**settings)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.half() if kinds[name] == "FLOAT" else tensor), name


@pytest.mark.parametrize("anti", ["m2", "m4"])
def test_anti_outlier_layer_by_layer(anti, lines, upstream, tmp_path):
    ours, _ = quantise(
        tmp_path / "ours", "--anti", anti, "--disable-level", "L0", "--act-method", "1", lines=lines
    )
    theirs = upstream(anti, w_bit=8, a_bit=8, act_method=1)
    for name, tensor in theirs.items():
        if name.endswith(("weight_scale", "input_scale", "layernorm.weight")):
            torch.testing.assert_close(ours[name].float(), tensor, rtol=1e-3, atol=0)
        elif tensor.dtype == torch.int8:
            steps = (ours[name].int() - tensor.int()).abs()
            assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3, name


# every family, through to the engine


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, texts, tmp_path):
    """Names as in the float checkpoint; the engine runs the result; vision stays as it was."""
    source = GOLDEN / family
    ours, kinds = quantise(tmp_path, model=source, lines=[texts])
    stored = Checkpoint(source)
    described = set(kinds) - set(halves_of(kinds))  # those are names without tensors
    assert {n for n in described if n.endswith(".weight")} == {
        n for n in stored.names if n.endswith(".weight")
    }
    assert all(kinds[name] == kind for name, kind in halves_of(kinds).items())
    family = family_of(source)
    quantised = {
        n.removesuffix(".weight")
        for n, kind in kinds.items()
        if n in described and n.endswith(".weight") and kind == "W8A8"
    }
    assert quantised and quantised <= set(chain.from_iterable(linear_groups(family).values()))
    vision = [w.source for w in family.weights() if w.parts and w.target.in_vision]
    assert all(
        torch.equal(ours[name], stored.tensor(name).to(ours[name].dtype))
        for name in vision
        if name in ours
    )
    text = [{"role": "user", "content": "描述这张图片。hello"}]
    logits = []
    for folder in (source, tmp_path):
        engine = Engine(folder, dtype="float32", max_model_len=128)
        logits.append(engine.prefill_logits(engine.prompt(text)))
    assert 0 < relative(logits[1], logits[0]) < 0.2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--scheme", "w8a8", "--anti", "m4", "--disable-level", "L0"),
        ("--scheme", "w8a8", "--anti", "m2"),
        ("--scheme", "w8a8s", "--anti", "m2", "--fraction", "0.05", "--dtype", "float16"),
        (
            "--scheme",
            "w8a8-dynamic",
        ),
        (
            "--scheme",
            "w8a16",
        ),
    ],
    ids=lambda arguments: arguments[1],
)
def test_norms_behind_the_branches_stay_as_they_are(arguments, texts, tmp_path):
    """Anti-outlier scales a norm against the linear layers that read its output alone; what a
    post-norm writes goes into the residual stream."""
    source = GOLDEN / "glm4_0414"
    ours, kinds = quantise(tmp_path, *arguments, model=source, lines=[texts])
    stored = Checkpoint(source)
    norms = [name for name in stored.names if name.endswith("layernorm.weight")]
    same = {name for name in norms if torch.equal(ours[name].float(), stored.tensor(name).float())}
    behind = {name for name in norms if "post_self_attn" in name or "post_mlp" in name}
    assert len(behind) == 8 and same == (behind if "--anti" in arguments else set(norms))
    biases = [name.replace("weight", "bias") for name in behind]  # msmodelslim may write zeros
    assert not any(ours[name].any() for name in biases if name in ours)
    engines = [Engine(folder, dtype="float32", max_model_len=128) for folder in (source, tmp_path)]
    prompts = [engine.prompt([{"role": "user", "content": "hello"}]) for engine in engines]
    a, b = (engine.prefill_logits(prompt) for engine, prompt in zip(engines, prompts))
    assert 0 < relative(b, a) < 0.25


def test_config_and_small_files(lines, tmp_path):
    quantise(tmp_path, "--dtype", "bfloat16", lines=lines)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["quantize"], config["torch_dtype"], config["dtype"]) == (
        "w8a8",
        "bfloat16",
        "bfloat16",
    )
    assert {t.dtype for n, t in tensors_of(tmp_path).items() if n.endswith("deq_scale")} == {
        torch.float32
    }
    assert (tmp_path / "tokenizer.json").read_bytes() == (GLM / "tokenizer.json").read_bytes()
    assert not (tmp_path / ".partial").exists() and not list(Path.cwd().glob("features.npy"))
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in tmp_path.glob("*.safetensors"))


def test_several_shards(lines, tmp_path, monkeypatch):
    whole, _ = quantise(tmp_path / "one", lines=lines)
    monkeypatch.setattr("quant.output.weights.SHARD_BYTES", 400_000)
    split, _ = quantise(tmp_path / "many", lines=lines)
    assert len(list((tmp_path / "many").glob("quant_model_weight_w8a8-0*.safetensors"))) >= 3
    assert whole.keys() == split.keys() and all(torch.equal(whole[n], split[n]) for n in whole)
    described = json.loads((tmp_path / "many" / CHECKSUMS).read_text())
    assert sorted(described) == sorted(
        file.name for file in (tmp_path / "many").glob("quant_model_*")
    )
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "many" / name).write_text("{}")  # edited by hand
    Engine(tmp_path / "many", max_model_len=64)


# guards


def test_scales_are_products_in_float32(lines, tmp_path):
    """In a float16 model msmodelslim multiplies in float16, where small scales underflow."""
    tensors, _ = quantise(tmp_path, lines=lines)
    for name in (n for n in tensors if n.endswith("deq_scale")):
        layer = name.removesuffix("deq_scale")
        product = tensors[layer + "input_scale"] * tensors[layer + "weight_scale"].flatten()
        assert tensors[layer + "input_scale"].dtype == torch.float32
        assert torch.equal(slim_scale(tensors[name]), product)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_input_scale_is_what_engines_see(dtype, lines, tmp_path):
    """They round it to the model's type; quant_bias is made with the same deq_scale."""
    tensors, _ = quantise(tmp_path, "--dtype", dtype, "--disable-level", "L0", lines=lines)
    names = [name for name in tensors if name.endswith("input_scale")]
    assert len(names) == 12
    for name in names:
        assert torch.equal(tensors[name], tensors[name].to(getattr(torch, dtype)).float())
    assert not judge_scales(tmp_path, GLM)["failed"]


def test_fused_gate_and_up_are_not_paired_with_down(lines):
    layer = LayerModule(family_of(GLM), Checkpoint(GLM), 0, [])
    pairs = msmodelslim_calls.norm_linear_subgraph(layer, "m4")
    assert all("down_proj" not in name for names in pairs.values() for name in names)
    assert pairs["model.layers.0.self_attn.v_proj"] == ["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("name", ["mlp.down_proj.weight", "input_layernorm.weight"])
def test_a_weight_with_nan_is_named_before_it_is_quantised(name, monkeypatch):
    name = f"model.layers.0.{name}"
    read = Checkpoint.tensor

    def damaged(self, wanted):
        tensor = read(self, wanted).clone()
        if wanted == name:
            tensor.view(-1)[3] = float("nan")
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", damaged)
    with pytest.raises(ToolkitError, match=f"^{name} in the checkpoint holds NaN or Inf; "):
        LayerModule(family_of(GLM), Checkpoint(GLM), 0, [])


def test_anti_outlier_that_changes_the_model_is_refused(lines, tmp_path, monkeypatch):
    """What msmodelslim's own graph does to GLM under m4."""
    real = msmodelslim_calls.norm_linear_subgraph
    monkeypatch.setattr(
        msmodelslim_calls,
        "norm_linear_subgraph",
        lambda layer, method: real(layer, method) | {layer.groups["up"][0]: layer.groups["down"]},
    )
    with pytest.raises(
        ToolkitError, match="--anti m4 changes what the float model computes, by .* use --anti m2"
    ) as caught:
        quantise(tmp_path, "--anti", "m4", lines=lines)
    assert (
        caught.value.exit_code == CHECK_FAILED
        and not (tmp_path / "quant_model_description.json").exists()
    )


def test_python_without_binaries(monkeypatch):
    monkeypatch.setattr(msmodelslim_calls.sys, "version_info", (3, 13, 0))
    msmodelslim_calls.import_msmodelslim.cache_clear()
    with pytest.raises(ToolkitError, match="no binaries for Python .* only up to 3.12") as caught:
        msmodelslim_calls.import_msmodelslim()
    assert caught.value.exit_code == MISSING_COMPONENT


def test_without_msmodelslim(monkeypatch):
    monkeypatch.setattr(msmodelslim_calls.importlib.util, "find_spec", lambda name: None)
    msmodelslim_calls.import_msmodelslim.cache_clear()
    with pytest.raises(ToolkitError, match="msmodelslim is not installed; run: pip install"):
        msmodelslim_calls.import_msmodelslim()


# gate


def test_gate_puts_the_worst_back_to_float(lines, tmp_path):
    """A limit between all quantised and nothing quantised: some groups go back, the fewest that
    do."""
    quantise(tmp_path / "all", "--disable-level", "L0", "--act-method", "1", lines=lines)
    figures = json.loads((tmp_path / "all" / "quant_report.json").read_text())["gate"]
    assert figures["kept_float"] == [] and figures["kl"] > 0
    limit = figures["kl"] / 2
    arguments = ["--disable-level", "L0", "--act-method", "1", "--max-kl", str(limit)]
    _, kinds = quantise(tmp_path / "some", *arguments, lines=lines)
    report = json.loads((tmp_path / "some" / "quant_report.json").read_text())["gate"]
    kept = report["kept_float"]
    assert 0 < len(kept) < 8 and report["kl"] <= limit
    assert report["tried"][str(len(kept) - 1)]["kl"] > limit
    groups = linear_groups(family_of(GLM))
    names = set()
    for name in kept:
        _, index, group = name.split(".")
        names.update(groups[int(index), group])
    linear_layers = chain.from_iterable(groups.values())
    assert {n for n in linear_layers if kinds[n + ".weight"] == "FLOAT"} == names
    assert msmodelslim_calls.SCHEMES["w8a8"].kind in kinds.values()


def test_gate_out_of_reach(lines, tmp_path):
    with pytest.raises(
        ToolkitError, match="quality gate cannot be reached: KL .*--calib"
    ) as caught:
        quantise(tmp_path, "--max-kl", "1e-12", "--min-top1", "1", lines=lines)
    assert caught.value.exit_code == CHECK_FAILED and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("enough", [0, 1, 2, 3, 5, 8, 9])
def test_fewest(enough):
    asked = []
    found = gate.fewest(lambda count: asked.append(count) or count >= enough, 8)
    assert found == (enough if enough <= 8 else None) and len(asked) <= 8


def test_gate_judges_what_the_engine_computes(lines, tmp_path):
    """KL by the gate and KL between two engines' logits."""
    file, ids = lines
    quantise(tmp_path, "--disable-level", "L0", "--act-method", "1", lines=lines)
    engines = [Engine(folder, dtype="float32", max_model_len=64) for folder in (GLM, tmp_path)]
    held = [engines[0].prompt_from_ids(line) for line in ids[3::4]]
    logits = [
        np.concatenate([engine.prefill_logits(prompt) for prompt in held]) for engine in engines
    ]
    report = json.loads((tmp_path / "quant_report.json").read_text())["gate"]
    assert gate.figures(*logits).kl == pytest.approx(report["kl"], rel=0.02)


# interruptions


def test_killed_run_goes_on(lines, tmp_path, monkeypatch):
    quantise(tmp_path / "straight", lines=lines)
    real = WorkFolder.save_layer
    calls = []

    def killed(self, index, *rest):
        if index == 1 and index not in calls:
            calls.append(index)
            raise KeyboardInterrupt
        calls.append(index)
        real(self, index, *rest)

    monkeypatch.setattr(WorkFolder, "save_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        quantise(tmp_path / "killed", lines=lines)
    assert not (tmp_path / "killed" / "quant_model_description.json").exists() and calls == [0, 1]
    quantise(tmp_path / "killed", lines=lines)
    assert calls == [0, 1, 1]  # the first layer was not done again
    for file in (tmp_path / "straight").glob("quant_model*"):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def test_resumed_run_keeps_the_order_of_samples(tmp_path, monkeypatch):
    """More than ten samples of different lengths: a file lists "float.10" before "float.2"."""
    file = tmp_path / "ids.jsonl"
    lines = [{"ids": list(range(3, 23 + i))} for i in range(16)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("--anti", "m2", "--act-method", "3")
    quantise(tmp_path / "straight", *arguments, lines=[file])
    real = WorkFolder.save_layer

    def killed(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        real(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            quantise(tmp_path / "killed", *arguments, lines=[file])
    quantise(tmp_path / "killed", *arguments, lines=[file])
    for weights in (tmp_path / "straight").glob("quant_model*"):
        assert (tmp_path / "killed" / weights.name).read_bytes() == weights.read_bytes()


def test_other_settings_start_afresh(lines, tmp_path, monkeypatch):
    def killed(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "pass_gate", killed)
        for method in ("1", "2"):
            with pytest.raises(KeyboardInterrupt):
                quantise(tmp_path, "--act-method", method, lines=lines)
    again, _ = quantise(tmp_path, "--act-method", "2", lines=lines)
    fresh, _ = quantise(tmp_path / "fresh", "--act-method", "2", lines=lines)
    assert all(torch.equal(again[n], fresh[n]) for n in fresh)


def test_statistics_are_measured_once(lines, tmp_path, monkeypatch):
    first, _ = quantise(tmp_path, "--disable-level", "L2", lines=lines)
    monkeypatch.setattr(plan, "input_ranges", lambda *rest: pytest.fail("measured again"))
    second, kinds = quantise(tmp_path, "--disable-level", "L2", "--scheme", "w8a16", lines=lines)
    floats = {n for n in second if n.endswith("_proj.weight") and kinds[n] == "FLOAT"}
    assert (
        floats == {n for n in first if n.endswith("_proj.weight") and first[n].dtype != torch.int8}
        and len(floats) >= 2
    )
