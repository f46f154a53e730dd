"""The packed vision tower against the plain module: every family, every precision, what the check
refuses."""

import numpy as np
import paths
import pytest
import torch

from models import family_of
from models.checkpoint import Checkpoint
from runtime.common import metrics
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.engine.loading.memory import plan_engine
from runtime.engine.options import EngineOptions
from runtime.vision import open_session
from runtime.vision import packed_tower as tower
from runtime.vision.torch_session import TorchVision, plain_tower

GOLDEN = paths.GOLDEN
FAMILIES = ["visualglm", "glm4v", "glm_edge_v", "llava"]


def worst(a, b) -> float:
    return metrics.cosine(
        *(np.asarray(x, np.float64).reshape(-1, a.shape[-1]) for x in (a, b))
    ).min()


@pytest.fixture(params=FAMILIES)
def case(request):
    """Family, checkpoint, a random image, its features by the plain module in float32."""
    family = family_of(GOLDEN / request.param)
    checkpoint = Checkpoint(GOLDEN / request.param)
    pixels = np.random.default_rng(1).uniform(0, 255, family.vision.input_shape).astype(np.float32)
    with torch.inference_mode():
        return (
            family,
            checkpoint,
            pixels,
            plain_tower(family, checkpoint, torch.float32)(torch.from_numpy(pixels)).numpy(),
        )


def test_float32_is_that_of_the_plain_module(case):
    family, checkpoint, pixels, expected = case
    np.testing.assert_allclose(
        TorchVision(family, checkpoint).encode(pixels), expected, rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_precisions_are_near_float32(case, precision):
    family, checkpoint, pixels, expected = case
    session = open_session("auto", family, checkpoint, precision=precision)
    assert (
        worst(expected, session.encode(pixels)) >= tower.COSINE[precision]
        and f", {precision}," in session.describe()
    )
    kinds = {type(module) for module in session.tower.modules()}
    assert not kinds & {tower.Dense, tower.Attention} and tower.FusedAttention in kinds


def test_the_check_refuses_what_int8_spoils():
    """One input channel a million times the others: 8 bits per token leave nothing of them."""
    family = family_of(GOLDEN / "visualglm")
    checkpoint = Checkpoint(GOLDEN / "visualglm")
    plain = plain_tower(family, checkpoint)
    for block in plain.vit.blocks:
        block.mlp_norm.weight.data[0] = 1e6
        block.mlp.up.weight.data[0] = 0
    with (
        pytest.raises(ToolkitError, match="use --vision-precision bf16") as error,
        torch.inference_mode(),
    ):
        tower.pack_checked(plain, "int8", tower.test_image(family.vision.input_shape))
    assert error.value.exit_code == CHECK_FAILED


def test_the_check_leaves_the_weights_as_stored():
    family = family_of(GOLDEN / "llava")
    checkpoint = Checkpoint(GOLDEN / "llava")
    plain = plain_tower(family, checkpoint, torch.float16)
    with torch.inference_mode():
        tower.float32_features(
            plain, torch.from_numpy(tower.waves_and_noise(family.vision.input_shape))
        )
    assert {p.dtype for p in plain.parameters()} == {torch.float16}


def test_plan_counts_what_the_precision_takes():
    family = family_of(GOLDEN / "visualglm")
    options = [EngineOptions(vision_precision=precision) for precision in ("fp32", "bf16", "int8")]
    sizes = [plan_engine(family, "float32", 256, each, None).vision for each in options]
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4]


@pytest.mark.parametrize("vision", ["onnx", "om"])
def test_what_was_converted_has_its_precision(vision):
    with pytest.raises(
        ToolkitError,
        match=f"--vision-precision is 'int8': --vision {vision} runs what was converted",
    ):
        EngineOptions(vision=vision, vision_precision="int8")
