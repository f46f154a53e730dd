"""The vision encoder in torch: takes images as float32, returns features as float32."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.progress import byte_progress

from .packed_tower import pack, pack_checked, test_image
from .session import FixedSizeSession


class TorchVision(FixedSizeSession):
    """The family's own module on the CPU, its layers packed for matmuls in `precision`: fp32, bf16
    or int8. The last two are checked against float32 on a test image."""

    stage = "torch vision encoder"

    def __init__(self, family: Family, checkpoint: Checkpoint, precision: str = "fp32"):
        """ToolkitError when bf16 or int8 changes the features too much."""
        super().__init__(family.vision)
        self.precision = precision
        self.source = checkpoint.directory
        self.tower = load_packed(
            family, checkpoint, precision, lambda: [test_image(self.spec.input_shape)]
        )

    def _encode(self, pixels):
        with torch.inference_mode():
            return self.tower(torch.from_numpy(pixels)).float().numpy()

    def describe(self):
        return torch_line(self.precision, self.source)


def torch_line(precision: str, directory: Path) -> str:
    """The line for the user about a tower that torch runs."""
    return f"vision: torch {torch.__version__} CPU, {precision}, weights of {directory}"


def load_packed(
    family: Family, checkpoint: Checkpoint, precision: str, test_inputs: Callable[[], list]
) -> nn.Module:
    """The family's module with packed layers. test_inputs(): what bf16 and int8 are checked on;
    ToolkitError when they change its features too much."""
    with torch.inference_mode():
        tower = plain_tower(family, checkpoint)
        if precision == "fp32":
            return pack(tower, precision)
        return pack_checked(tower, precision, *test_inputs())


def plain_tower(family: Family, checkpoint: Checkpoint, dtype=None) -> nn.Module:
    """The family's module with the checkpoint's weights, as stored or as `dtype`."""
    with torch.device("meta"):
        tower = family.vision_encoder().eval().requires_grad_(False)
    weights = {}
    with byte_progress("loading vision weights") as update:
        for name, tensor in checkpoint.assemble(
            family.weights(), prefix="vision.", dtype=dtype, progress=update
        ):
            weights[name.removeprefix("vision.")] = tensor
    tower.load_state_dict(weights, assign=True)
    return tower
