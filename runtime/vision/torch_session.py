"""The vision encoder in torch."""

from models.checkpoint.reader import Checkpoint
from models.family import Family

from .session import VisionSession


class TorchVision(VisionSession):
    """The family's own module on the CPU, its layers packed for products in `precision`: fp32, bf16 or int8. The last two
    are checked against float32 on a test picture."""

    stage = "torch vision encoder"

    def __init__(self, family: Family, checkpoint: Checkpoint, precision: str = "fp32"):
        import torch

        from .packed_tower import pack, pack_checked

        super().__init__(family.vision)
        self.torch = torch
        self.precision = precision
        self.source = checkpoint.directory
        with torch.inference_mode():
            tower = plain_tower(family, checkpoint)
            self.tower = (
                pack(tower, "fp32")
                if precision == "fp32"
                else pack_checked(tower, precision, self.spec.input_shape)
            )

    def _encode(self, pixels):
        with self.torch.inference_mode():
            return self.tower(self.torch.from_numpy(pixels)).float().numpy()

    def describe(self):
        return f"vision: torch {self.torch.__version__} CPU, {self.precision}, weights of {self.source}"


def plain_tower(family: Family, checkpoint: Checkpoint, dtype=None):
    """The family's module with the checkpoint's weights, as stored or as `dtype`."""
    import torch

    from runtime.common.progress import byte_progress

    with torch.device("meta"):
        tower = family.vision_encoder().eval().requires_grad_(False)
    with byte_progress("loading vision weights") as update:
        tower.load_state_dict(
            {
                name.removeprefix("vision."): tensor
                for name, tensor in checkpoint.assemble(
                    family.weights(), prefix="vision.", dtype=dtype, progress=update
                )
            },
            assign=True,
        )
    return tower
