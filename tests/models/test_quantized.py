"""Quantised directories: msmodelslim's own files (tests/golden/msmodelslim) read and run with integer arithmetic.

golden.npz of a case: ids; int8, the logits of integer arithmetic inside transformers' model in the files' dtype; float32,
the same in float32; <layer>.in and <layer>.out of two layers. errors.json: the errors recorded when they were made.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime.engine.loading.build
from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import (
    KINDS,
    Quantized,
    find_description,
    float_scale,
    layer_of,
    stored_weights,
)
from models.errors import ModelError
from models.families.llava import _decoder as llama_decoder
from models.families.templated import TemplatedFamily
from models.families.weight_rows import decoder_weights as decoder_rows
from models.network.linear import Linear, Stacked
from models.prompt.tokenizers.json_file import JsonTokenizer
from runtime import Engine
from runtime.engine.loading.weights import decoder_weights
from runtime.ops.cpu.ops import CpuOps, PackedInt8
from runtime.ops.reference import ReferenceOps
from runtime.parallel.split import Split
from runtime.vision.source import Source

GOLDEN = paths.GOLDEN / "msmodelslim"
CASES = (
    "glm_f16_w8a8",
    "glm_bf16_w8a8",
    "glm_f16_w8a8_m4",
    "glm_f16_w8a8s",
    "glm_f16_w8a8_dynamic",
    "glm_f16_cli_v1_w8a8_static",
    "llama_f16_w8a8_m4",
)
MATRICES = ("qkv.weight", "out.weight", "up.weight", "down.weight")
SAME_ARITHMETIC = 1e-5  # float32 against float32: nothing is rounded to another step


class Llama(TemplatedFamily):
    """Plain LLaMA, which is no family of the product: LLaVA's language model alone."""

    name = "llama"
    stop_ids = ()

    def __init__(self, directory, config):
        super().__init__(directory, config)
        self.decoder = llama_decoder(config)
        self.tokenizer = JsonTokenizer(Path(directory) / "tokenizer.json")

    def weights(self):
        return list(decoder_rows(self.decoder, "model.", "lm_head.weight"))


@pytest.fixture(autouse=True)
def plain_llama(monkeypatch):
    def family(directory):
        config = json.loads((Path(directory) / "config.json").read_text())
        if config["model_type"] != "llama":
            return family_of(directory)
        llama = Llama(directory, config)
        llama.rule = "a test says so"
        return llama

    monkeypatch.setattr(runtime.engine.loading.build, "family_of", family)


def golden(case):
    return np.load(GOLDEN / case / "golden.npz")


def open_engine(directory, **options):
    return Engine(directory, **{"dtype": "float32", "max_model_len": 64, **options})


def prefill(engine, ids):
    return engine.prefill_logits(engine.prompt_from_ids(ids))


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def copy(tmp_path):
    """A quantised directory that a test may change: copy(case) -> (folder, tensors, description)."""

    def make(case):
        folder = Path(shutil.copytree(GOLDEN / case, tmp_path / case))
        (file,) = folder.glob("*.safetensors")
        return (
            folder,
            load_file(file),
            json.loads((folder / "quant_model_description.json").read_text()),
        )

    return make


def rewrite(folder, tensors, description):
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file)
    (folder / "quant_model_description.json").write_text(json.dumps(description))


# golden directories


@pytest.mark.parametrize("ops", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_integer_arithmetic(case, ops):
    data = golden(case)
    assert (
        relative(prefill(open_engine(GOLDEN / case, ops=ops), data["ids"]), data["float32"])
        < SAME_ARITHMETIC
    )


@pytest.mark.parametrize("case", ["glm_f16_w8a8", "glm_f16_w8a8s", "glm_f16_w8a8_dynamic"])
def test_without_vnni(case, monkeypatch):
    """oneDNN's 16-bit sums saturate on such CPUs; torch._int_mm computes instead."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", None)
    data = golden(case)
    engine = open_engine(GOLDEN / case, ops="cpu")
    assert isinstance(engine._runner.decoder.layers[0].out, Quantized)
    assert relative(prefill(engine, data["ids"]), data["float32"]) < SAME_ARITHMETIC


@pytest.mark.parametrize("case", CASES)
def test_recorded_logits_within_recorded_tolerance(case):
    """In the files' own dtype; half-precision rounding moves values to other steps, as it does inside msmodelslim."""
    data = golden(case)
    errors = json.loads((GOLDEN / case / "errors.json").read_text())
    limit = errors.get("logits int8 vs fake", errors["logits int8 vs float"])
    dtype = "bfloat16" if "bf16" in case else "float16"
    found = prefill(open_engine(GOLDEN / case, ops="reference", dtype=dtype), data["ids"])
    assert relative(found, data["int8"].astype(np.float32)) < limit


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps()], ids=lambda ops: ops.name)
@pytest.mark.parametrize("case", [case for case in CASES if "cli" not in case])
def test_recorded_layer_outputs(case, ops):
    """Layers of the files before rows are permuted or joined, in the recorded dtype: the same values."""
    data = golden(case)
    tensors = load_file(next((GOLDEN / case).glob("*.safetensors")))
    kind = json.loads((GOLDEN / case / "errors.json").read_text())["kind"].upper()
    dtype = tensors["lm_head.weight"].dtype
    for name in {key.rsplit(".", 1)[0] for key in data.files if key.endswith(".in")}:
        names = {tensor: f"{name}.{tensor}" for tensor in (*KINDS[kind].needed, "bias")}
        layer = layer_of(
            {0: (kind, {t: tensors[n] for t, n in names.items() if n in tensors})}, dtype
        )
        if layer.static:
            assert isinstance(layer.input_offset, int)
        found = ops.quantized_linear(
            torch.from_numpy(data[name + ".in"]).to(dtype), ops.pack_quantized(layer, dtype)
        )
        expected = torch.from_numpy(data[name + ".out"]).to(dtype)
        assert (
            found == expected
        ).float().mean() > 0.999  # the last bit may differ: the sum's order
        torch.testing.assert_close(found, expected)


def test_the_fast_kernels_run():
    layers = open_engine(GOLDEN / "glm_f16_w8a8")._runner.decoder.layers
    assert all(
        isinstance(getattr(layer, name), PackedInt8)
        for layer in layers
        for name in ("qkv", "out", "up", "down")
    )


def test_decoding_agrees_with_prefill():
    engine = open_engine(GOLDEN / "glm_f16_w8a8")
    ids = golden("glm_f16_w8a8")["ids"]
    whole = prefill(engine, ids)
    step_by_step = engine.score(engine.prompt_from_ids(ids[:8]), [*ids[8:], 0])
    assert relative(step_by_step, whole[7:]) < 1e-5


def test_memory_plan_counts_int8():
    family = family_of(GOLDEN / "glm_f16_w8a8")
    d = family.decoder
    plan = open_engine(GOLDEN / "glm_f16_w8a8").plan
    rows = (d.heads + 2 * d.kv_heads) * d.head_dim + d.hidden + 2 * d.ffn
    int8 = d.layers * (rows * d.hidden + d.hidden * d.ffn)
    floats = 4 * (2 * d.vocab_size * d.hidden + (2 * d.layers + 1) * d.hidden)
    scales = d.layers * (8 * (rows + d.hidden) + 8 * 6)
    assert plan.weights == int8 + floats + scales


# layouts


def test_old_layout(copy):
    """The classic `safe_tensor` layout: description with the kind in its name, norms written twice."""
    folder, tensors, description = copy("glm_f16_w8a8_m4")
    for name in [name for name in tensors if "norm." in name]:
        layer, _, tensor = name.rpartition(".")
        twin = f"{layer}.module.{tensor}"
        tensors[twin] = tensors[name].clone()
        description[twin] = "W8A8"
    rewrite(folder, tensors, {k: v for k, v in description.items() if k != "version"})
    (folder / "quant_model_description.json").rename(folder / "quant_model_description_w8a8.json")
    data = golden("glm_f16_w8a8_m4")
    assert relative(prefill(open_engine(folder), data["ids"]), data["float32"]) < SAME_ARITHMETIC


def test_w8a16(copy):
    """Weight-only: the float model on dequantised weights."""
    folder, tensors, description = copy("glm_f16_w8a8_dynamic")
    rewrite(
        folder, tensors, {k: "W8A16" if v == "W8A8_DYNAMIC" else v for k, v in description.items()}
    )
    ids = golden("glm_f16_w8a8_dynamic")["ids"]
    found = prefill(open_engine(folder), ids)
    assert relative(found, prefill(open_engine(folder, ops="reference"), ids)) < 1e-5
    assert relative(found, prefill(open_engine(GOLDEN / "float" / "glm_f16"), ids)) < 0.05


def test_layers_of_different_kinds_in_one_projection(copy):
    """q float, k dynamic, v static: three pieces of one fused layer, each by its own rule."""
    folder, tensors, description = copy("glm_f16_w8a8")
    q, k = (f"model.layers.0.self_attn.{n}_proj." for n in "qk")
    tensors[q + "weight"] = load_file(GOLDEN / "float" / "glm_f16" / "model.safetensors")[
        q + "weight"
    ]
    description[q + "weight"] = "FLOAT"
    for name in KINDS["W8A8"].needed[1:] + KINDS["W8A8"].unused:
        del tensors[q + name], description[q + name]
    for name in KINDS["W8A8"].needed[1:]:
        del tensors[k + name], description[k + name]
    description |= {k + name: "W8A8_DYNAMIC" for name in KINDS["W8A8_DYNAMIC"].needed}
    rewrite(folder, tensors, description)
    engine = open_engine(folder)
    exact = open_engine(folder, ops="reference")
    parts = engine._runner.decoder.layers[0].qkv.parts
    assert [type(part) for part in parts] == [Linear, PackedInt8, PackedInt8]
    ids = golden("glm_f16_w8a8")["ids"]
    assert relative(prefill(engine, ids), prefill(exact, ids)) < 1e-5
    assert 0 < relative(prefill(engine, ids), golden("glm_f16_w8a8")["float32"]) < 0.5


def test_pieces_join_only_if_equal():
    def piece(scale, kind="W8A8"):
        return kind, {
            "weight": torch.ones(2, 4, dtype=torch.int8),
            "deq_scale": torch.ones(2),
            "quant_bias": torch.zeros(2, dtype=torch.int32),
            "input_scale": torch.tensor([scale]),
            "input_offset": torch.zeros(1),
        }

    joined = layer_of({2: piece(0.5), 0: piece(0.5)}, torch.float32)
    assert isinstance(joined, Quantized) and joined.weight.shape == (4, 4) and len(joined.bias) == 4
    assert isinstance(layer_of({0: piece(0.5), 2: piece(0.25)}, torch.float32), Stacked)
    assert isinstance(layer_of({0: piece(0.5), 2: piece(0.5, "W8A8S")}, torch.float32), Stacked)


def test_scales_stored_as_int64():
    scales = torch.tensor([1.5, 2e-9, 3e38])
    assert torch.equal(float_scale(scales.view(torch.int32).to(torch.int64)), scales)
    assert torch.equal(float_scale(scales), scales)


def weight_only(family, folder):
    """Two folders: the golden checkpoint of `family` with random int8 layers as W8A16, and those layers dequantised."""
    source = paths.GOLDEN / family
    table = family_of(source).weights()
    checkpoint = Checkpoint(source)
    layers = {
        w.source[:-7]
        for w in table
        if w.parts and w.target.layer is not None and str(w.target).endswith(MATRICES)
    }
    plain = {}
    quantised = {}
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        layer = name.removesuffix(".weight")
        if layer not in layers:
            plain[name] = quantised[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        values = (tensor.float() / scale).round()
        plain[name] = values * scale
        quantised[name] = values.to(torch.int8)
        quantised |= {
            layer + ".weight_scale": scale,
            layer + ".weight_offset": torch.zeros_like(scale),
        }
    kinds = {
        n: "W8A16" if n.rpartition(".")[0] in layers and not n.endswith("bias") else "FLOAT"
        for n in quantised
    }
    for which, tensors in (("plain", plain), ("quantised", quantised)):
        shutil.copytree(
            source,
            folder / which,
            ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", "hf", "sharded"),
        )
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            folder / which / "model.safetensors",
        )
    description = {"model_quant_type": "W8A16", **kinds}
    (folder / "quantised" / "quant_model_description.json").write_text(json.dumps(description))
    return folder / "plain", folder / "quantised"


@pytest.mark.parametrize("family", ["visualglm", "glm4", "glm4v", "glm_edge", "llava"])
def test_every_family_s_rows_are_permuted_with_their_scales(family, tmp_path):
    """Under the names of each family: the quantised folder's layers are the dequantised folder's."""
    expected, found = map(weights_of, weight_only(family, tmp_path))
    for name in {n for n in expected if n.endswith(MATRICES)}:
        layer = found[name.removesuffix(".weight")]
        torch.testing.assert_close(layer.weight * layer.scale[:, None], expected[name])
        bias = expected.get(name.removesuffix("weight") + "bias")
        assert (bias is None) == (layer.bias is None) and (
            bias is None or torch.equal(bias.float(), layer.bias)
        )


def test_pictures(tmp_path):
    """The vision tower of a quantised folder is the float one, and exports to the same artifact."""
    plain, quantised = weight_only("visualglm", tmp_path)
    families = [family_of(folder) for folder in (plain, quantised)]
    assert len({Source(family, Checkpoint(family.directory)).hash for family in families}) == 1
    Checkpoint(quantised).check(stored_weights(families[1]))
    picture = {"type": "image", "image": paths.GOLDEN / "visualglm" / "image.png"}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": "描述这张图片。"}]}]
    logits = [
        (e := open_engine(folder, vision="torch")).prefill_logits(e.prompt(chat))
        for folder in (plain, quantised)
    ]
    assert relative(*logits) < 1e-4


def weights_of(directory):
    family = family_of(directory)
    return decoder_weights(
        Checkpoint(directory), family, torch.float32, "cpu", ReferenceOps(), Split(family.decoder)
    )


# directories that do not fit together


def test_compressed_weights_are_refused(copy):
    folder, tensors, description = copy("glm_f16_w8a8s")
    rewrite(folder, tensors, {k: "W8A8SC" if v == "W8A8S" else v for k, v in description.items()})
    with pytest.raises(
        ModelError, match="kind W8A8SC, .* only the NPU's own kernel can decompress it"
    ):
        open_engine(folder)


def test_description_and_weights_from_different_runs(copy):
    folder, tensors, description = copy("glm_f16_w8a8")
    del description["model.norm.weight"]
    rewrite(folder, tensors, description)
    with pytest.raises(
        ModelError, match="1 tensors stored but not described, e.g. model.norm.weight"
    ):
        open_engine(folder)


def test_missing_tensor_of_a_layer(copy):
    folder, tensors, description = copy("glm_f16_w8a8")
    del tensors["model.layers.1.self_attn.o_proj.quant_bias"]
    rewrite(folder, tensors, description)
    with pytest.raises(
        ModelError, match="missing:\n    model.layers.1.self_attn.o_proj.quant_bias"
    ):
        open_engine(folder)


def test_wrong_dtype(copy):
    folder, tensors, description = copy("glm_f16_w8a8")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].float()
    rewrite(folder, tensors, description)
    with pytest.raises(ModelError, match="model.layers.0.mlp.down_proj.weight is torch.float32"):
        open_engine(folder)


def test_weight_offsets_are_refused(copy):
    folder, tensors, description = copy("glm_f16_w8a8_dynamic")
    tensors["model.layers.0.mlp.down_proj.weight_offset"][3] = 1
    rewrite(folder, tensors, description)
    with pytest.raises(ModelError, match="has weight offsets"):
        open_engine(folder)


def test_float_directory_has_no_description():
    directory = GOLDEN / "float" / "glm_f16"
    assert find_description(directory) is None
    assert len(stored_weights(family_of(directory))) == len(family_of(directory).weights())
