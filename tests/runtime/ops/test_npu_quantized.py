"""Quantised layers on the NPU backend: torch_npu's own schemas, plain arithmetic behind them
(tests/npu/cpu_kernels.py)."""

import json

import cpu_kernels
import numpy as np
import paths
import pytest
import torch

from models.checkpoint.quantized import Quantized
from runtime import Engine
from runtime.ascend.socs import A2, P310
from runtime.common.errors import ToolkitError
from runtime.engine.loading import build
from runtime.ops.npu.ops import NpuOps
from runtime.ops.reference import ReferenceOps

GOLDEN = paths.GOLDEN / "msmodelslim"
ROUNDED_TWICE = 1.5  # the kernel takes the scale's reciprocal in half precision: more values move to another step
COMBINATIONS = [(A2, "float16"), (A2, "bfloat16"), (P310, "float16")]


@pytest.fixture(scope="module", autouse=True)
def torch_npu():
    with cpu_kernels.in_place():
        yield


@pytest.fixture(params=COMBINATIONS, ids=lambda c: f"{c[0].name.split()[1]}-{c[1]}")
def chip(request):
    soc, dtype = request.param
    return NpuOps(soc, "cpu"), getattr(torch, dtype)


def layer_of(kind, n=48, k=64):
    torch.manual_seed(0)
    static = kind in ("W8A8", "W8A8S")
    bias = torch.randint(-5000, 5000, (n,), dtype=torch.int32) if static else torch.randn(n)
    return Quantized(
        kind,
        torch.randint(-127, 128, (n, k), dtype=torch.int8),
        torch.rand(n) * 1e-3 + 1e-4,
        bias,
        *((0.03125, -7) if static else ()),
    )


@pytest.mark.parametrize("kind", ["W8A8", "W8A8S", "W8A8_DYNAMIC", "W8A16"])
def test_layer(chip, kind):
    """The reciprocal scale is exact here, so that both sides round the same numbers."""
    ops, dtype = chip
    layer = layer_of(kind)
    x = torch.randn(5, 64).to(dtype)
    if kind == "W8A8_DYNAMIC" and not ops.soc.token_scales:
        with pytest.raises(
            ToolkitError,
            match="Ascend 310P has no int8 matmul with a scale per token.*--scheme w8a8",
        ):
            ops.pack_quantized(layer, dtype)
        return
    found = ops.quantized_linear(x, ops.pack_quantized(layer, dtype))
    expected = ReferenceOps().quantized_linear(x, layer)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_bias_is_optional():
    ops = NpuOps(A2, "cpu")
    for kind in ("W8A8_DYNAMIC", "W8A16"):
        layer = layer_of(kind)
        x = torch.randn(3, 64).half()
        layer.bias = None
        torch.testing.assert_close(
            ops.quantized_linear(x, ops.pack_quantized(layer, torch.float16)),
            ReferenceOps().quantized_linear(x, layer),
            rtol=1e-2,
            atol=1e-2,
        )


@pytest.mark.parametrize(
    "case", ["glm_f16_w8a8", "glm_f16_w8a8_m4", "glm_f16_w8a8s", "glm_f16_w8a8_dynamic"]
)
@pytest.mark.parametrize("soc", [A2, P310], ids=lambda soc: soc.name.split()[1])
def test_whole_model(case, soc, monkeypatch):
    """Prefill and recorded decode steps of msmodelslim's own directories, against integer
    arithmetic in float32."""
    if "dynamic" in case and not soc.token_scales:
        pytest.skip("the chip has no matmul for it, see test_layer")
    data = np.load(GOLDEN / case / "golden.npz")
    errors = json.loads((GOLDEN / case / "errors.json").read_text())
    cpu_kernels.stand_in_for(soc)
    monkeypatch.setattr(build, "choose", lambda name, device, kernels: NpuOps(soc, "cpu"))
    engine = Engine(GOLDEN / case, max_model_len=256)
    prompt = engine.prompt_from_ids(data["ids"][:16])
    found = np.concatenate(
        (engine.prefill_logits(prompt)[:-1], engine.score(prompt, [*data["ids"][16:], 0]))
    )
    error = np.linalg.norm(found - data["float32"]) / np.linalg.norm(data["float32"])
    assert error < ROUNDED_TWICE * errors["logits int8 vs fake"]
