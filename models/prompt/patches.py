"""Pictures of any size as rows of patches, as the GLM-4.1V and GLM-OCR processors make them.

Takes a picture (path, bytes, PIL) and the limits of a release, returns Patches: normalised rows and
their grid. What the encoder needs beside them, it computes from the grid
(models/network/patch_geometry.py).
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.config import BLOCK_PATCHES, FRAMES, MERGE, PATCH, PATCH_VALUES
from models.errors import ModelError

BLOCK = PATCH * MERGE
MAX_RATIO = 200  # of the longer side to the shorter one
WHOLE_GRID = 2 << 14  # patches along a side, more than any limit of pixels leaves


@dataclass(frozen=True)
class PatchRules:
    """Of a release's preprocessor_config.json. least, most: pixels of a picture, which counts twice,
    as two frames. mean, std: of each channel, for values 0..1."""

    least: int
    most: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def most_patches(self) -> int:
        """Of the largest picture."""
        return int(self.most / FRAMES / PATCH**2)


@dataclass(frozen=True, eq=False)
class Patches:
    """One picture. rows: float32 [N, 1176], normalised, in the order of the 2 x 2 blocks; within a
    row channel, frame, y, x. grid: its patches down and across, N in all."""

    rows: np.ndarray
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Rows of the sequence that the picture becomes."""
        return len(self.rows) // BLOCK_PATCHES

    def tobytes(self) -> bytes:
        """Grid and rows: equal for equal pictures only."""
        return repr(self.grid).encode() + self.rows.tobytes()


def fitted_size(width: int, height: int, rules: PatchRules) -> tuple[int, int]:
    """(width, height) that a picture is resized to: multiples of 28, within the limits of `rules`,
    with about the same ratio. ModelError for sides of too large a ratio.

    As transformers' smart_resize of these families (Python's round: halves to the even number).
    """
    if min(width, height) < BLOCK:
        scale = max(BLOCK / height, BLOCK / width)
        height = int(height * scale)
        width = int(width * scale)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ModelError(
            f"a picture of {width} x {height} pixels is too narrow: one side may be {MAX_RATIO} times "
            "as long as the other; crop it first"
        )
    fitted_height = round(height / BLOCK) * BLOCK
    fitted_width = round(width / BLOCK) * BLOCK
    pixels = FRAMES * height * width
    if FRAMES * fitted_height * fitted_width > rules.most:
        shrink = math.sqrt(pixels / rules.most)
        fitted_height = max(BLOCK, math.floor(height / shrink / BLOCK) * BLOCK)
        fitted_width = max(BLOCK, math.floor(width / shrink / BLOCK) * BLOCK)
    elif FRAMES * fitted_height * fitted_width < rules.least:
        grow = math.sqrt(rules.least / pixels)
        fitted_height = math.ceil(height * grow / BLOCK) * BLOCK
        fitted_width = math.ceil(width * grow / BLOCK) * BLOCK
    return fitted_width, fitted_height


def cut(image: Image.Image, rules: PatchRules) -> Patches:
    """RGB image -> its Patches: resized bicubically by PIL, normalised, cut."""
    width, height = fitted_size(*image.size, rules)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.float32) / np.float32(255)
    pixels = (pixels - np.float32(rules.mean)) / np.float32(rules.std)
    down = height // PATCH
    across = width // PATCH
    blocks = pixels.reshape(down // MERGE, MERGE, PATCH, across // MERGE, MERGE, PATCH, 3)
    ordered = blocks.transpose(
        0, 3, 1, 4, 6, 2, 5
    )  # block row and column, row, column, channel, y, x
    frames = np.repeat(ordered[:, :, :, :, :, None], FRAMES, axis=5)
    return Patches(frames.reshape(down * across, PATCH_VALUES), (down, across))


def given_patches(picture) -> Patches:
    """{"pixel_values": [N, 1176], "grid_thw": [1, down, across]}, as a release's processor returns
    them, -> Patches. ModelError for anything else, and for a grid that does not have N patches."""
    try:
        rows = np.asarray(picture["pixel_values"])
        grid = np.asarray(picture["grid_thw"]).reshape(-1)
    except (KeyError, TypeError, ValueError, IndexError):
        raise ModelError(
            'a picture is {"pixel_values": float [N, 1176], "grid_thw": [1, rows, columns]}, as the '
            "release's processor returns it"
        ) from None
    if (
        rows.ndim != 2
        or rows.shape[1] != PATCH_VALUES
        or not np.issubdtype(rows.dtype, np.floating)
    ):
        raise ModelError(
            f"pixel_values are {rows.dtype} {list(rows.shape)}, expected float [N, {PATCH_VALUES}], a row per "
            "patch"
        )
    return Patches(np.ascontiguousarray(rows, np.float32), _checked_grid(grid, len(rows)))


def _checked_grid(grid: np.ndarray, rows: int) -> tuple[int, int]:
    whole = np.issubdtype(grid.dtype, np.integer) and grid.shape == (3,)
    if not whole or grid[0] != 1 or min(grid) < 1 or max(grid) > WHOLE_GRID:
        raise ModelError(
            f"grid_thw is {grid.tolist()}, expected [1, patch rows, patch columns] of one picture"
        )
    _, down, across = map(int, grid)
    if down % MERGE or across % MERGE or down * across != rows:
        raise ModelError(
            f"grid_thw says {down} x {across} patches, pixel_values has {rows} rows: there must be one row "
            "per patch, and an even number of patches down and across"
        )
    return down, across
