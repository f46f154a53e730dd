"""NaN and Inf: no form of weights or activations swallows them, and they end one request alone."""

import shutil
from types import SimpleNamespace

import cpu_kernels
import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file

from models.checkpoint.quantized import Quantized
from models.network.decoder import Step
from models.network.vision_blocks import Attention
from runtime import Engine, SamplingParams
from runtime.ascend.socs import A2, P310
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.engine.loading import build
from runtime.ops.cpu import native, native_library
from runtime.ops.cpu.ops import CpuOps
from runtime.ops.cpu.packed_weights import Int4Weight, Int8Weight
from runtime.ops.cuda import CudaOps
from runtime.ops.npu.ops import NpuOps
from runtime.ops.reference import ReferenceOps
from runtime.vision.packed_tower import FusedAttention

BAD = [float("nan"), float("inf"), -float("inf")]
SMALL = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
DAMAGED = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"


@pytest.fixture(scope="module", autouse=True)
def torch_npu():
    with cpu_kernels.in_place():
        yield


def layer(form: str, ops, dtype=torch.bfloat16):
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
    made = ops.pack_quantized(quantized, dtype)
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


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "soc, dtype, form",
    [
        (A2, torch.bfloat16, "static"),
        (A2, torch.float16, "static"),
        (P310, torch.float16, "static"),
        (A2, torch.bfloat16, "dynamic"),
    ],
)
def test_a_bad_token_shows_on_the_npu(soc, dtype, form, bad):
    compute = layer(form, NpuOps(soc, "cpu"), dtype)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = compute(x.clone())
    x[1, 77] = bad
    found = compute(x)
    assert wanted.isfinite().all() and not found[1].isfinite().any()
    torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize(
    "q_lens, kv_lens", [([3, 2], [3, 2]), ([1, 1], [1, 20]), ([40, 2], [40, 9])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_on_the_cpu(dtype, q_lens, kv_lens, part, bad):
    """The last new token of the first sequence is bad: it shows, and so does the token that comes
    after it; the second sequence is as it was."""
    torch.manual_seed(0)
    place = {"q": 5, "k": 4 * 16 + 5, "v": 6 * 16 + 5}[part]
    keys, values = torch.randn(2, 8, 16, 2, 16).to(dtype)
    qkv = torch.randn(sum(q_lens), 8 * 16).to(dtype)
    wanted = attended(qkv, keys.clone(), values.clone(), q_lens, kv_lens)
    qkv[q_lens[0] - 1, place] = bad
    found = attended(qkv, keys, values, q_lens, kv_lens)
    later = attended(torch.randn(1, 8 * 16).to(dtype), keys, values, [1], [kv_lens[0] + 1])
    assert wanted.isfinite().all()
    assert not found[q_lens[0] - 1].isfinite().any() and not later.isfinite().any()
    assert torch.equal(found[q_lens[0] :], wanted[q_lens[0] :])


@pytest.mark.skipif(native_library.kernels() is None, reason="no kernels on this machine")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("kv_lens", [[1, 1], [20, 33]])
def test_attention_of_the_kernels(kv_lens, part, bad):
    torch.manual_seed(0)
    place = {"q": 5, "k": 4 * 32 + 5, "v": 6 * 32 + 5}[part]
    keys, values = torch.randn(2, 8, 16, 2, 32).bfloat16()
    qkv = torch.randn(2, 8 * 32).bfloat16()
    wanted = attended(qkv, keys.clone(), values.clone(), [1, 1], kv_lens, 32)
    qkv[0, place] = bad
    found = attended(qkv, keys, values, [1, 1], kv_lens, 32)
    assert not found[0].isfinite().all() and torch.equal(found[1], wanted[1])


def attended(qkv, keys, values, q_lens, kv_lens, head_dim=16):
    ops = CpuOps()
    config = SimpleNamespace(heads=4, kv_heads=2, head_dim=head_dim)
    step = ops.begin(step_of(q_lens, kv_lens, qkv.dtype, head_dim), config, "cpu")
    return ops.attend(qkv.clone(), keys, values, config, step)


def step_of(q_lens, kv_lens, dtype, head_dim) -> Step:
    """Sequence i has the blocks 4 i to 4 i + 3 of 16 tokens."""
    slots = []
    for index, (new, length) in enumerate(zip(q_lens, kv_lens)):
        slots += range(64 * index + length - new, 64 * index + length)
    angles = torch.zeros(sum(q_lens), head_dim, dtype=dtype)
    tables = torch.arange(4 * len(q_lens), dtype=torch.int32).view(-1, 4)
    return Step(angles + 1, angles, torch.tensor(slots), tables, list(q_lens), list(kv_lens))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_attention_of_the_vision_tower(part, bad):
    torch.manual_seed(0)
    plain = Attention(32, 2)
    for each in plain.parameters():
        torch.nn.init.normal_(each, std=0.1)
    getattr(plain, part).bias.data[3] = bad
    found = FusedAttention(plain, "fp32")(torch.randn(1, 9, 32))
    assert not found.isfinite().any()


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


@pytest.mark.parametrize(
    "kind, value, words",
    [
        ("input_scale", 0.0, "scales that are zero or negative"),
        ("input_scale", -1.0, "scales that are zero or negative"),
        ("deq_scale", 0, "scales that are zero or negative"),
        ("input_offset", 10_000.0, "a zero point lies from -128 to 127"),
        ("input_offset", -129.0, "a zero point lies from -128 to 127"),
    ],
)
def test_scales_that_no_quantisation_gives(kind, value, words, tmp_path):
    """As a block of zeros leaves them: what is computed with them is finite, and wrong."""
    shutil.copytree(GOLDEN / "msmodelslim/glm_f16_w8a8", tmp_path / "m")
    [file] = (tmp_path / "m").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(kind))
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "m" / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(ToolkitError, match=f"{name} in the checkpoint .*{words}") as caught:
        Engine(tmp_path / "m", dtype="float32")
    assert caught.value.exit_code == CHECK_FAILED


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


@pytest.fixture(params=["cpu", "reference", "cuda", "cuda graphs", "npu", "npu 310P"])
def engine_of(request, monkeypatch):
    """A function that opens the golden GLM-4 with the operators of a device, on the CPU's
    tensors."""
    kind = request.param
    options = {"dtype": "float16" if kind == "npu 310P" else "float32", "enforce_eager": True}
    if kind == "cuda graphs":
        options["enforce_eager"] = False
    if kind == "npu":
        options["dtype"] = "bfloat16"
    ops = {
        "cpu": CpuOps,
        "reference": ReferenceOps,
        "cuda": lambda: CudaOps("cpu"),
        "cuda graphs": lambda: CudaOps("cpu"),
        "npu": lambda: NpuOps(A2, "cpu"),
        "npu 310P": lambda: NpuOps(P310, "cpu"),
    }[kind]
    cpu_kernels.stand_in_for(P310 if kind == "npu 310P" else A2)
    monkeypatch.setattr(build, "choose", lambda name, device, kernels: ops())
    for name in ("graph_pool_handle", "synchronize", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(cpu_kernels.FAKE_TORCH_NPU, name))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "graph", cpu_kernels.fake_graph_context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cpu_kernels.FakeGraph)
    return lambda: Engine(GOLDEN / "glm4", max_model_len=64, **options)


def test_what_a_bad_request_left_in_the_cache_harms_nobody(engine_of):
    """Its blocks are the next ones to be used, by sequences that do not fill them."""
    prompts = [[5, 8, 7], [*range(10, 30)], [6, 8]]
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    clean = engine_of()
    wanted = clean.generate([clean.prompt_from_ids(ids) for ids in prompts], params)
    engine = engine_of()
    engine.decoder.embedding[9] = float("nan")
    for length in (4, 12, 14):
        bad = engine.add(engine.prompt_from_ids([9] * length), SMALL)
    while engine.busy:
        engine.step()
    assert bad.result.finish_reason == "error"
    found = engine.generate([engine.prompt_from_ids(ids) for ids in prompts], params)
    for own, other in zip(found, wanted):
        assert own.token_ids == other.token_ids
        for mine, theirs in zip(own.logprobs, other.logprobs):
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_what_a_bad_request_computed_is_not_found_again():
    """An error that passes, of memory or of a device, ends the request that met it alone, and not
    all that begin the same."""
    engine = Engine(GOLDEN / "glm4", dtype="float32", max_model_len=64, max_num_batched_tokens=20)
    ids = [*range(5, 50)]
    good = engine.decoder.embedding[9].clone()
    engine.decoder.embedding[9] = float("nan")
    with pytest.raises(ToolkitError, match="NaN or Inf"):
        engine.generate([engine.prompt_from_ids(ids)], SMALL)
    engine.decoder.embedding[9] = good
    [found] = engine.generate([engine.prompt_from_ids(ids)], SMALL)
    assert found.metrics["cached_tokens"] == 0
    [again] = engine.generate([engine.prompt_from_ids(ids)], SMALL)
    assert again.metrics["cached_tokens"] == 32 and again.token_ids == found.token_ids


@pytest.mark.parametrize(
    "name",
    [
        "transformer.embedding.word_embeddings.weight",
        "transformer.encoder.layers.0.input_layernorm.weight",
        "transformer.encoder.layers.0.self_attention.query_key_value.weight",
        "transformer.encoder.layers.0.self_attention.query_key_value.bias",
        "transformer.encoder.layers.1.self_attention.dense.weight",
        DAMAGED,
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bad_float_weight_ends_the_answer(name, dtype, tmp_path):
    """Wherever it stands: in what becomes a key, a score, a share, a hidden state or a logit."""
    folder = damaged(tmp_path / "model", name)
    engine = Engine(folder, dtype=dtype, max_model_len=64)
    with pytest.raises(ToolkitError, match="^the decoder's logits contain NaN or Inf; ") as error:
        engine.generate([engine.prompt_from_ids([0, 5, 7])], SMALL)
    assert error.value.exit_code == CHECK_FAILED
    assert not engine.busy and engine.load() == (0, 0, 0.0)
