"""The vision encoder as an .om on the NPU.

Takes images as raw float32 NHWC, returns features as float32. The file itself may take float32,
float16 or uint8 (raw 0..255 is exact in all three) and give float32 or float16, one image at a time
or in batch gears.
"""

from pathlib import Path

import numpy as np

from models.config import VisionSpec
from runtime.ascend.aclruntime import OmModel
from runtime.common.errors import ToolkitError

from .session import FixedSizeSession

LARGEST_HALF = 65504.0
# relative, with which a file's input dtype holds pixels that are no whole numbers
PRECISION = {np.dtype(np.float32): 0.0, np.dtype(np.float16): 1e-3, np.dtype(np.uint8): 0.0}


class OmVision(FixedSizeSession):
    """An .om on npu:`device_id`. `npu_seconds`: time of the last call on the NPU without copies."""

    stage = "OM vision encoder"

    def __init__(
        self, path: str | Path, spec: VisionSpec, device_id: int = 0, verified: bool = False
    ):
        """ToolkitError when the file cannot be loaded or its interface is not `spec`'s."""
        super().__init__(spec)
        self.model = OmModel(path, device_id, spec.output_name)
        self.verified = verified
        try:
            _check_interface(self.model, spec)
        except ToolkitError:
            self.close()
            raise
        self.batch = self.model.gears[-1]

    @property
    def unverified(self) -> Path | None:
        return None if self.verified else Path(self.model.path)

    @property
    def npu_seconds(self) -> float:
        return self.model.npu_seconds

    def close(self):
        self.model.close()

    def _encode(self, pixels):
        """In the smallest gear that holds them, filled up with zeros, in the file's own dtypes."""
        count = len(pixels)
        gear = next(gear for gear in self.model.gears if gear >= count)
        filled = np.zeros((gear, *pixels.shape[1:]), self.model.input_dtype)
        filled[:count] = np.clip(pixels, 0, 255) if filled.dtype == np.uint8 else pixels
        if not np.allclose(filled[:count], pixels, rtol=PRECISION[filled.dtype], atol=0):
            raise ToolkitError(
                f"{self.model.path} takes {filled.dtype}, which cannot hold these pixels: prepare "
                "pictures with the family's `pixels`; where its preprocessor_config.json has another "
                "mean or deviation than the release, convert without --aipp"
            )
        return with_overflow(self.model.run(filled)[:count])

    def describe(self):
        model = self.model
        text = f"vision: om {model.path} on npu:{model.device_id}"
        text += f", {model.input_dtype} in, {model.output_dtype} out"
        if len(model.gears) > 1:
            text += f", gears {', '.join(map(str, model.gears))}"
        if not self.verified:
            text += ", not verified against this checkpoint"
        return text


def with_overflow(features: np.ndarray) -> np.ndarray:
    """An .om's output as float32, Inf where float16 ended: aclruntime lets the NPU saturate, so that
    an overflow looks finite."""
    found = features.astype(np.float32)
    if features.dtype == np.float16:
        found[np.abs(found) >= LARGEST_HALF] = np.inf
    return found


def _check_interface(model: OmModel, spec: VisionSpec):
    _check_shape(model, "input", model.input_shape, spec.input_shape)
    _check_shape(model, "output", model.output_shape, spec.output_shape)


def _check_shape(model: OmModel, tensor: str, shape: tuple, wanted: tuple):
    if shape[1:] != wanted[1:]:
        raise ToolkitError(
            f"{model.path} has {tensor} shape {list(shape)}, this model needs [batch, "
            f"{', '.join(map(str, wanted[1:]))}]; convert it with `python -m convert`"
        )
