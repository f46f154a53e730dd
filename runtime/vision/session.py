"""What a vision session is: takes images in the family's input layout, returns feature rows."""

from pathlib import Path

import numpy as np

from models.config import VisionSpec
from runtime.common.errors import CHECK_FAILED, ToolkitError


class VisionSession:
    """What every session is, whatever pictures it takes."""

    stage: str
    unverified: Path | None = None  # file or artifact in use that nobody has compared with torch

    def encode_all(self, pictures: list) -> list[np.ndarray]:
        """float32 [rows, hidden] of each picture, as the family's `pixels` makes it. ToolkitError
        for features that are NaN or Inf."""
        raise NotImplementedError

    def close(self):
        """Give back what the session holds outside this process."""

    def describe(self) -> str:
        """One line for the user: "vision: ...", what computes, and from which weights."""
        raise NotImplementedError


class FixedSizeSession(VisionSession):
    """Pictures of one size. What every such session does around `_encode`: check the pixels going
    in and the features coming out."""

    batch = 1  # images `_encode` takes at most

    def __init__(self, spec: VisionSpec):
        self.spec = spec

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels float32 [n, *input_shape[1:]] -> features float32 [n, rows, hidden], for any n.

        ToolkitError on another dtype or shape, and for features that are NaN or Inf.
        """
        wanted = self.spec.input_shape[1:]
        if pixels.dtype != np.float32 or pixels.shape[1:] != wanted:
            raise ToolkitError(
                f"{self.stage} got pixels {pixels.dtype} {list(pixels.shape)}, it takes float32 "
                f"[n, {', '.join(map(str, wanted))}]; prepare pictures with the family's `pixels`"
            )
        features = np.empty((len(pixels), *self.spec.output_shape[1:]), np.float32)
        pixels = np.ascontiguousarray(pixels)
        for start in range(0, len(pixels), self.batch):
            part = slice(start, start + self.batch)
            found = self._encode(pixels[part])
            check_shape(found, features[part].shape, self.stage)  # numpy would repeat one row
            features[part] = found
        check_finite(features, self.stage)
        return features

    def encode_all(self, pictures):
        return list(self.encode(np.concatenate(pictures)))

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """Contiguous pixels of 1 to `batch` images -> their features, both as `encode` has them."""
        raise NotImplementedError


def check_shape(features: np.ndarray, wanted: tuple[int, ...], stage: str):
    """ToolkitError (exit 1) for features of another shape."""
    if features.shape != wanted:
        raise ToolkitError(
            f"{stage} gave features {list(features.shape)}, not {list(wanted)}; make it again with "
            "`python -m convert`",
            CHECK_FAILED,
        )


def check_finite(features: np.ndarray, stage: str):
    """ToolkitError (exit 1) for features that are NaN or Inf."""
    if not np.isfinite(features).all():
        raise ToolkitError(
            f"{stage} gave NaN or Inf; check the checkpoint's vision weights with "
            "`python -m convert`",
            CHECK_FAILED,
        )
