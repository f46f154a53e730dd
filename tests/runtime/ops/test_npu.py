"""The NPU backend on CPU tensors: torch_npu's own schemas, plain arithmetic behind them
(tests/npu/cpu_kernels.py).

Shows that every family's calls are well-formed and its numbers right, in both cache layouts, eager
and through recorded graphs. What a chip's kernels do with those calls is shown elsewhere; see
docs/npu.md.
"""

from dataclasses import replace

import cpu_kernels
import numpy as np
import paths
import pytest
import torch

from runtime import Engine, SamplingParams
from runtime.ascend import socs
from runtime.ascend.socs import A2, A3, P310, soc_of
from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.engine.loading import build
from runtime.ops.npu.kernels import ATTENTION, WRITES, Kernel
from runtime.ops.npu.open import kernel_set, open_npu
from runtime.ops.npu.ops import NpuOps

GOLDEN = paths.GOLDEN
FAMILIES = paths.FAMILIES
TOKENS = [5, 7, 11]
GREEDY = SamplingParams(max_tokens=4, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
SMALL_BLOCKS = (16,)  # so that tiny prompts span several blocks


@pytest.fixture(scope="module", autouse=True)
def torch_npu():
    with cpu_kernels.in_place():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request):
    return Engine(
        GOLDEN / request.param, dtype="float32", ops="reference", vision="torch", max_model_len=256
    )


@pytest.fixture(scope="module")
def expected(reference):
    """Of every prompt: prefill logits, teacher-forced logits, greedy tokens."""
    return (
        [reference.prefill_logits(p) for p in prompts(reference)],
        [reference.score(p, TOKENS) for p in prompts(reference)],
        [result.token_ids for result in reference.generate(prompts(reference), GREEDY)],
    )


SETS = {
    "910B aclnn": (A2, socs.A2_ACLNN),
    "910B aclnn, torch_npu 2.9": (A2, socs.A2_ACLNN_OLDER),
    "910B atb": (A2, socs.A2_ATB),
    "310P": (P310, socs.P310_ATB),
    "310P, torch_npu 2.9": (P310, socs.P310_ATB_OLDER),
}


@pytest.fixture(scope="module", params=SETS.values(), ids=SETS.keys())
def kernels(request):
    """(chip, kernel set) that compute in float32, over small blocks."""
    soc, kernels = request.param
    cpu_kernels.stand_in_for(soc)
    return replace(soc, dtypes=("float32",)), replace(kernels, block_sizes=SMALL_BLOCKS)


@pytest.fixture(scope="module")
def engine(reference, kernels):
    soc, kernels = kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "choose", lambda name, device, asked: NpuOps(soc, device, kernels))
        return Engine(
            reference.family.directory, dtype="float32", vision="torch", max_model_len=256
        )


def prompts(engine):
    """An image prompt where the family takes one, a text prompt, and the shortest prompt there
    is."""
    image = (
        [{"type": "image", "image": GOLDEN / "visualglm" / "image.png"}]
        if engine.family.vision
        else []
    )
    texts = ("描述这张图片。", "hello world, and more")
    chats = [
        engine.prompt(
            [{"role": "user", "content": [*image[: 1 - i], {"type": "text", "text": text}]}]
        )
        for i, text in enumerate(texts)
    ]
    shortest = 2 if chats[1].layout.bidirectional else 1
    return chats + [engine.prompt_from_ids(chats[1].ids[-shortest:])]


def test_prefill_and_decode_logits(expected, engine):
    prefill, scores, _ = expected
    for prompt, whole, forced in zip(prompts(engine), prefill, scores):
        np.testing.assert_allclose(engine.prefill_logits(prompt), whole, atol=ATOL)
        np.testing.assert_allclose(engine.score(prompt, TOKENS), forced, atol=ATOL)


def test_decode_kernel_by_kernel(expected, engine, monkeypatch):
    """What --enforce-eager does, and batches larger than any recorded one."""
    monkeypatch.setattr(engine._runner, "graphs", None)
    for prompt, forced in zip(prompts(engine), expected[1]):
        np.testing.assert_allclose(engine.score(prompt, TOKENS), forced, atol=ATOL)


def test_batches_of_unequal_prompts(expected, engine):
    """Three sequences fill up a recorded batch of four; nine are more than the largest."""
    tokens = expected[2]
    assert [result.token_ids for result in engine.generate(prompts(engine), GREEDY)] == tokens
    assert [
        result.token_ids for result in engine.generate(prompts(engine) * 3, GREEDY)
    ] == tokens * 3


def test_answer_as_part_of_the_prompt(expected, engine):
    """Behind a prefix-LM context this is an extension: several queries, and more keys than
    queries."""
    longer = engine.prompt_from_ids(np.concatenate((prompts(engine)[1].ids, TOKENS)))
    np.testing.assert_allclose(engine.prefill_logits(longer)[-4:-1], expected[1][1], atol=ATOL)


# chips


@pytest.mark.parametrize(
    "code, soc",
    [(200, P310), (202, P310), (205, P310), (220, A2), (223, A2), (225, A2), (250, A3), (255, A3)],
)
def test_chip_table(code, soc):
    assert soc_of(code, "some chip") is soc


@pytest.mark.parametrize("code", [100, 104, 206, 219, 226, 240, 260])
def test_chip_that_is_not_in_the_table(code):
    with pytest.raises(
        ToolkitError, match=f"the chip Ascend9 \\(number {code}\\) is not supported"
    ):
        soc_of(code, "Ascend9")


def test_bfloat16_is_refused_on_310p():
    NpuOps(A2, "cpu").check("bfloat16")
    with pytest.raises(
        ToolkitError, match="Ascend 310P does not support --dtype bfloat16; use --dtype float16"
    ):
        NpuOps(P310, "cpu").check("bfloat16")


@pytest.mark.parametrize(
    "soc, kernels, wanted, used",
    [
        (A2, socs.A2_ACLNN, 16, 128),
        (A2, socs.A2_ACLNN, 128, 128),
        (A2, socs.A2_ATB, 64, 64),
        (A2, socs.A2_ATB, 20, 16),
        (A2, socs.A2_ATB, 512, 128),
        (P310, socs.P310_ATB, 16, 64),
        (P310, socs.P310_ATB, 96, 128),
    ],
)
def test_nearest_block_size_that_attention_pages_by(soc, kernels, wanted, used):
    assert NpuOps(soc, "cpu", kernels).nearest_block_size(wanted) == used


@pytest.mark.parametrize(
    "soc, released, chosen",
    [
        (A2, "float16", "float16"),
        (A2, "bfloat16", "bfloat16"),
        (A2, "float32", "float16"),
        (P310, "bfloat16", "float16"),
    ],
)
def test_dtype_auto(reference, monkeypatch, soc, released, chosen):
    monkeypatch.setattr(reference.family, "config", {"torch_dtype": released})
    assert NpuOps(soc, "cpu").default_dtype(reference.family) == chosen


def test_explicit_npu_without_torch_npu():
    with pytest.raises(
        ToolkitError, match="needs torch_npu, which is not installed; run: pip install"
    ) as caught:
        open_npu("npu:0")
    assert caught.value.exit_code == MISSING_COMPONENT


# kernel sets


def test_graphs_are_recorded_where_the_set_allows_it(engine):
    assert engine._ops.records_graphs == (engine._runner.graphs is not None)


def test_a_named_set():
    """auto is the chip's first; a chip without the set says which it has."""
    assert kernel_set(A2, "auto", "2.13.0") is socs.A2_ACLNN
    assert kernel_set(A2, "atb", "2.13.0") is socs.A2_ATB
    assert kernel_set(P310, "auto", "2.13.0") is socs.P310_ATB
    with pytest.raises(
        ToolkitError, match="--kernels aclnn: Ascend 310P has no such set; use .*atb"
    ):
        kernel_set(P310, "aclnn", "2.13.0")


def test_kernels_that_no_npu_runs_are_noted(caplog):
    with caplog.at_level("INFO", "ascend_vlm"):
        Engine(GOLDEN / "glm4", kernels="atb", vision="torch", max_model_len=256)
    assert "--kernels atb has no effect: cpu operators run on cpu" in caplog.text


def test_the_note_about_steps_without_graphs(caplog, monkeypatch):
    soc = replace(A2, dtypes=("float32",))
    monkeypatch.setattr(
        build, "choose", lambda name, device, asked: NpuOps(soc, device, socs.A2_ATB)
    )
    with caplog.at_level("INFO", "ascend_vlm"):
        Engine(
            GOLDEN / "glm4",
            kernels="atb",
            dtype="float32",
            block_size=64,
            vision="torch",
            max_model_len=256,
        )
    assert "no decode graphs are recorded, every step runs kernel by kernel" in caplog.text
    assert "block-size" not in caplog.text


SCATTER_OF_2_9 = (
    "npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None, "
    "Tensor? seq_lens=None) -> ()"
)


def test_the_variant_that_torch_npu_declares_whole(monkeypatch):
    """2.7.1 and 2.9.0 declare npu_scatter_pa_kv_cache without cache_mode, and no compressed masks."""
    library = torch.library.Library("npu_2_9", "DEF")
    library.define(SCATTER_OF_2_9)
    older = Kernel(None, "npu_2_9.npu_scatter_pa_kv_cache", "cache_mode")
    assert not older.declared() and replace(older, argument=None).declared()
    monkeypatch.setitem(WRITES, "scatter_blocks", older)
    monkeypatch.setitem(ATTENTION, "flash", Kernel(None, "npu_2_9._npu_flash_attention_v3"))
    assert kernel_set(A2, "auto", "2.9.0") is socs.A2_ACLNN_OLDER
    assert kernel_set(P310, "atb", "2.9.0") is socs.P310_ATB_OLDER


def test_a_torch_npu_without_the_operators(monkeypatch):
    monkeypatch.setitem(WRITES, "reshape_and_cache", Kernel(None, "npu_2_1.no_such"))
    with pytest.raises(ToolkitError, match="torch_npu 2.1.0 has no npu_2_1.no_such.*==2.13.0") as e:
        kernel_set(P310, "auto", "2.1.0")
    assert e.value.exit_code == MISSING_COMPONENT
