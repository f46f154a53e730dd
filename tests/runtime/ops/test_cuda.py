"""The GPU's operators. Without a GPU they compute on CPU tensors, and a stand-in records and
replays the decode graphs."""

from types import SimpleNamespace

import cpu_kernels
import numpy as np
import paths
import pytest
import torch

from runtime import Engine, SamplingParams
from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.engine.loading import build
from runtime.ops.cuda import CudaOps

GOLDEN = paths.GOLDEN
FAMILIES = ("visualglm", "glm4", "glm4_0414", "glm4v", "glm_edge", "llava")
SETTINGS = {"dtype": "float32", "vision": "torch", "max_model_len": 256}
GREEDY = SamplingParams(max_tokens=8, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
WITH_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def on_cpu(monkeypatch):
    """CudaOps where the CPU's operators would be; graphs are recorded by the stand-in of
    tests/npu."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", cpu_kernels.fake_graph_context)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cpu_kernels.FakeGraph)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 33, 1 << 33))
    choose = build.choose
    monkeypatch.setattr(
        build,
        "choose",
        lambda name, device, kernels: CudaOps(device) if name == "auto" else choose(name, device),
    )


def cases(engine):
    rng = np.random.default_rng(0)
    return (
        [engine.prompt_from_ids(rng.integers(5, 60, n)) for n in (1, 17, 40)]
        if engine.family.name != "visualglm"
        else [
            engine.prompt([{"role": "user", "content": text}])
            for text in ("hello", "你好 world " * 4, "abc " * 9)
        ]
    )


def check(engine, name):
    """Mixed batches and prompts in pieces of 7 tokens: the tokens and logits of the reference."""
    oracle = Engine(GOLDEN / name, ops="reference", **SETTINGS)
    prompts = cases(engine)
    together = [result.token_ids for result in engine.generate(prompts, GREEDY)]
    assert together == [oracle.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    for prompt, tokens in zip(prompts, together):
        np.testing.assert_allclose(
            engine.score(prompt, tokens), oracle.score(prompt, tokens), atol=ATOL
        )
    assert engine._cache.used_blocks == (engine._runner.graphs is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_kernel_by_kernel(name, on_cpu):
    engine = Engine(GOLDEN / name, max_num_batched_tokens=7, enforce_eager=True, **SETTINGS)
    assert engine._ops.name == "cuda" and engine._runner.graphs is None
    check(engine, name)


@pytest.mark.parametrize("name", ["visualglm", "glm4"])
def test_recorded_decode_steps(name, on_cpu):
    """Three prompts in one step, then one by one: the recordings for 4 sequences and for 1."""
    engine = Engine(GOLDEN / name, **SETTINGS)
    check(engine, name)
    recordings = engine._runner.graphs._recordings
    assert recordings[1].graph.replays and recordings[4].graph.replays
    assert not any(recording.graph.waits_for_update for recording in recordings.values())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_torch_without_cuda_is_told_what_to_install():
    with pytest.raises(
        ToolkitError, match="--device cuda:0 needs a torch built for CUDA, this is .*; run: pip "
    ) as hint:
        Engine(GOLDEN / "glm_edge", device="cuda", **SETTINGS)
    assert hint.value.exit_code == MISSING_COMPONENT


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ToolkitError, match="--device cuda:3: torch sees 1 GPUs; check `nvidia-smi`"
    ):
        Engine(GOLDEN / "glm_edge", device="cuda:3", **SETTINGS)


@pytest.mark.parametrize(
    "options", [{"tensor_parallel_size": 2}, {"cpu_weights": "int8"}, {"device": "cuda:x"}]
)
def test_what_a_gpu_does_not_do(options):
    with pytest.raises(
        ToolkitError, match="tensor-parallel-size|cpu-weights|use cpu, npu, npu:N, cuda or cuda:N"
    ):
        Engine(GOLDEN / "glm_edge", **{"device": "cuda:0", **SETTINGS, **options})


@pytest.mark.parametrize(
    ("released", "bf16", "expected"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float16"),
        ("float16", False, "float16"),
        ("float32", True, "float16"),
    ],
)
def test_dtype_follows_the_release(released, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    ops = CudaOps("cuda:0")
    assert ops.default_dtype(SimpleNamespace(config={"torch_dtype": released})) == expected
    if not bf16:
        with pytest.raises(
            ToolkitError, match="Tesla does not support --dtype bfloat16; use --dtype float16"
        ):
            ops.check("bfloat16")


@WITH_GPU
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu(name, eager):
    check(
        Engine(
            GOLDEN / name,
            device="cuda:0",
            enforce_eager=eager,
            max_num_batched_tokens=7,
            **SETTINGS,
        ),
        name,
    )
