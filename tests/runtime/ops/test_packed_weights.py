"""--cpu-weights: packed layers against float ones, the folder in the cache, answers of a packed
model."""

import numpy as np
import other_scenes
import paths
import pytest
import torch
from demo_model import DEMO, answers
from PIL import Image
from torch.nn import functional as F

from models.synthetic.write import write_checkpoint
from runtime import Engine, SamplingParams
from runtime.common.errors import ToolkitError
from runtime.common.notes import notes_on_stderr
from runtime.engine.loading import cpu_weights as packing
from runtime.engine.loading.memory import plan_engine
from runtime.engine.options import EngineOptions
from runtime.ops.cpu.packed_weights import (
    FLOAT_ROWS,
    GROUP,
    SMALLEST,
    TORCH_LARGE_BATCH,
    Int4Weight,
    Int8Weight,
)
from runtime.plan.estimate import find_family

GOLDEN = paths.GOLDEN
COSINE = {Int8Weight: 0.9999, Int4Weight: 0.99}
SHAPES = [(2048, 2048), (256, 6144), (4608, 1024), (112, 256)]
SETTINGS = {"dtype": "float32", "vision": "torch", "max_model_len": 256}
GREEDY = SamplingParams(max_tokens=6, temperature=0, repetition_penalty=1.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, TORCH_LARGE_BATCH])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", COSINE)
def test_layer_against_float(form, shape, tokens, dtype):
    weight = 0.02 * gaussian(*shape)
    x = gaussian(tokens, shape[1], seed=1).to(dtype)
    bias = gaussian(shape[0], seed=2).to(dtype)
    packed = form.from_tensors(form.tensors(weight))
    for b in (None, bias):
        y = packed(x, b)
        expected = F.linear(x.float(), weight, None if b is None else b.float())
        assert y.dtype == dtype and y.shape == expected.shape
        if b is None:
            assert (
                F.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) >= COSINE[form]
            )


def test_int8_sums_are_exact_at_the_extremes():
    """All products at their largest, where sums of pairs in 16 bits would saturate."""
    q = torch.full((64, 256), -127, dtype=torch.int8)
    x = torch.ones(2, 256)
    x[1, ::2] = -1
    y = Int8Weight(q, torch.full((64,), 1 / 127))(x, None)
    torch.testing.assert_close(y, torch.tensor([[-256.0], [0.0]]).expand(2, 64))


@pytest.mark.parametrize("form", COSINE)
def test_zeros_stay_zero(form):
    weight = gaussian(64, 256)
    weight[3] = 0
    packed = form.from_tensors(form.tensors(weight))
    x = torch.stack((torch.zeros(256), torch.ones(256)))
    y = packed(x, None)
    assert (y[0] == 0).all() and y[1, 3].abs() < 256 * 16 * SMALLEST and y[1].abs().max() > 1


@pytest.mark.parametrize("form", COSINE)
def test_rounding_and_packing_in_pieces_of_rows(form, monkeypatch):
    weight = gaussian(320, 2 * GROUP).bfloat16()
    x = gaussian(3, 2 * GROUP, seed=1)
    stored = form.tensors(weight)
    whole = form.from_tensors(stored)(x, None)
    monkeypatch.setattr("runtime.ops.cpu.packed_weights.PACKED_ROWS", 128)
    for name, tensor in form.tensors(weight).items():
        assert torch.equal(tensor, stored[name]) and tensor.is_contiguous()
    assert torch.equal(form.from_tensors(stored)(x, None), whole)


@pytest.mark.parametrize(
    "shape", [(FLOAT_ROWS + 192, 256), (48, 256)]
)  # pieces; rows that fill no block
def test_int4_of_many_tokens_is_that_of_few(shape):
    weight = gaussian(*shape)
    x = gaussian(TORCH_LARGE_BATCH, shape[1], seed=1).bfloat16()
    packed = Int4Weight.from_tensors(Int4Weight.tensors(weight))
    small = torch.cat([packed(part, None) for part in x.split(TORCH_LARGE_BATCH // 2)])
    torch.testing.assert_close(packed(x, None), small, rtol=0.02, atol=0.25)
    assert (
        F.cosine_similarity(packed(x, None).flatten().float(), small.flatten().float(), dim=0)
        > 0.9999
    )


@pytest.mark.parametrize(
    "name", ["visualglm", "glm4", "glm4_0414", "glm_edge_v", "llava", "glm_ocr"]
)
def test_int8_model_is_close_to_the_float_one(name):
    exact, packed = (
        Engine(GOLDEN / name, cpu_weights=kind, **SETTINGS) for kind in ("float", "int8")
    )
    prompt = exact.prompt([{"role": "user", "content": "描述 hello world"}])
    a, b = (torch.from_numpy(engine.prefill_logits(prompt)) for engine in (exact, packed))
    assert F.cosine_similarity(a, b).min() > 0.995
    alone = [packed.generate([p], GREEDY)[0].token_ids for p in (prompt, prompt)]
    assert [result.token_ids for result in packed.generate([prompt, prompt], GREEDY)] == alone
    assert packed.describe()[1].endswith("weights packed to int8")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_demo_model_still_sees(kind):
    engine = Engine(DEMO, dtype="float32", vision="torch", cpu_weights=kind)
    right = []
    assert type(engine._runner.decoder.layers[0].up.weight) is packing.FORMS[kind]
    for seed in range(6):
        things, rng = other_scenes.scene(f"en{seed}")
        image = Image.fromarray(other_scenes.draw(things, rng))
        turns = other_scenes.questions(things, rng)
        given = answers(engine, [(image, question["en"]) for _, question, _ in turns], "en")
        right += [text == answer["en"] for (_, _, answer), text in zip(turns, given)]
    assert len(right) > 30 and sum(right) >= 0.95 * len(right)


def synthetic(folder):
    write_checkpoint("glm-edge-1.5b-chat", folder, scale="tiny", report=lambda line: None)
    return folder


def test_folder_is_written_once_and_only_whole(cache, tmp_path, monkeypatch, capsys):
    model = synthetic(tmp_path / "model")
    stored = packing._stored
    monkeypatch.setattr(
        packing,
        "_stored",
        lambda name, *rest: 1 / 0 if name.startswith("final") else stored(name, *rest),
    )
    with pytest.raises(ZeroDivisionError):
        Engine(model, cpu_weights="int8", max_model_len=64)
    assert all(folder.name.startswith(".") for folder in cache.iterdir())
    monkeypatch.setattr(packing, "_stored", stored)
    capsys.readouterr()
    with notes_on_stderr():
        first = Engine(model, cpu_weights="int8", max_model_len=64)
    assert "packing the decoder to int8 once" in capsys.readouterr().err
    with notes_on_stderr():
        again = Engine(model, cpu_weights="int8", max_model_len=64)
    assert "packing" not in capsys.readouterr().err and len(list(cache.iterdir())) == 1
    prompt = first.prompt_from_ids([5, 6, 7])
    np.testing.assert_array_equal(first.prefill_logits(prompt), again.prefill_logits(prompt))


def test_other_weights_are_packed_again(cache, tmp_path):
    model = synthetic(tmp_path / "model")
    Engine(model, cpu_weights="int8", max_model_len=64)
    file = next(model.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100:] = bytes(100)
    file.write_bytes(data)
    Engine(model, cpu_weights="int8", max_model_len=64)
    Engine(model, cpu_weights="int4", max_model_len=64)
    assert sorted(folder.name[-4:] for folder in cache.iterdir()) == ["int4", "int8", "int8"]


def test_plan_counts_packed_bytes(tmp_path):
    family = find_family("glm-edge-1.5b-chat")
    size = {}
    for kind in ("float", "int8", "int4"):
        size[kind] = plan_engine(
            family, "bfloat16", 512, EngineOptions(cpu_weights=kind), None
        ).weights
    matrices = 1.3506e9
    head = 0.1214e9
    table = 0.1214e9
    assert size["float"] == pytest.approx(2 * (matrices + head + table), rel=1e-3)
    assert size["int8"] == pytest.approx(matrices + head + 2 * table, rel=1e-3)
    assert size["int4"] == pytest.approx(matrices * 4.25 / 8 + head + 2 * table, rel=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"cpu_weights": "int8", "ops": "reference"},
            "--cpu-weights is 'int8': it needs --device cpu",
        ),
        (
            {"cpu_weights": "int8", "device": "npu"},
            "--cpu-weights is 'int8': it needs --device cpu",
        ),
        ({"cpu_weights": "int3"}, "--cpu-weights is 'int3': use one of float, int8, int4"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ToolkitError, match=message):
        Engine(GOLDEN / "glm4", **options)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ToolkitError, match="set ASCEND_VLM_CACHE to another folder"):
        Engine(GOLDEN / "glm4", cpu_weights="int8", **SETTINGS)


def test_a_quantised_checkpoint_is_not_packed_again(tmp_path):
    model = synthetic(tmp_path / "model")
    (model / "quant_model_description.json").write_text('{"model_quant_type": "W8A8"}')
    with pytest.raises(ToolkitError, match="--cpu-weights int4 packs float checkpoints"):
        Engine(model, cpu_weights="int4")
