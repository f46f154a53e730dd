"""Where the patches of a picture lie: what an encoder of pictures of any size takes beside them.

Takes grids (patches down and across), returns arrays with a row per patch, in the order of the
2 x 2 blocks. Computed outside the encoder's graph, in float32, so that the graph has no index
arithmetic.
"""

import numpy as np

from models.config import MERGE

CUBIC = -0.75  # a of the bicubic kernel, as in torch
THETA = 10000.0


def places(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of every patch, int64 [N] each."""
    down, across = grid
    rows, columns = np.indices((down, across))
    return _by_blocks(rows), _by_blocks(columns)


def rotary_rows(grid: tuple[int, int], head_dim: int, theta: float = THETA) -> np.ndarray:
    """float32 [N, head_dim]: the cosines of head_dim / 2 angles, then their sines.

    The first half of the angles is the patch's row, the second its column, each times
    theta^(-4 j / head_dim), j < head_dim / 4.
    """
    quarter = head_dim // 4
    frequencies = theta ** (-np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angles = [place[:, None] * frequencies for place in places(grid)]
    both = np.concatenate(angles, axis=1).astype(np.float32)
    return np.concatenate((np.cos(both), np.sin(both)), axis=1)


def position_rows(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """float32 [N, hidden]: a learned map, table [S * S, hidden], sampled bicubically at the centre
    of every patch; border values continue outside (torch's grid_sample with align_corners=False,
    padding_mode="border")."""
    side = round(len(table) ** 0.5)
    down, across = (_sampling(patches, side) for patches in grid)
    maps = table.astype(np.float32).reshape(side, side, -1)
    sampled = np.einsum("hs,swc->hwc", down, np.einsum("wt,stc->swc", across, maps))
    blocks = sampled.reshape(grid[0] // MERGE, MERGE, grid[1] // MERGE, MERGE, -1)
    return np.ascontiguousarray(blocks.swapaxes(1, 2).reshape(grid[0] * grid[1], -1))


def segment_rows(counts: list[int]) -> np.ndarray:
    """float32 [N, 1]: the number of the picture, 0, 1, ..., that each row belongs to."""
    return np.repeat(np.arange(len(counts), dtype=np.float32), counts)[:, None]


def _by_blocks(values: np.ndarray) -> np.ndarray:
    down, across = values.shape
    return values.reshape(down // MERGE, MERGE, across // MERGE, MERGE).swapaxes(1, 2).reshape(-1)


def _sampling(patches: int, side: int) -> np.ndarray:
    """float32 [patches, side]: what each value of an axis of the map contributes to each patch."""
    centres = (np.arange(patches) + 0.5) * side / patches - 0.5
    first = np.floor(centres)
    weights = np.zeros((patches, side))
    for tap in (-1, 0, 1, 2):
        source = np.clip(first + tap, 0, side - 1).astype(np.int64)
        np.add.at(weights, (np.arange(patches), source), _cubic(np.abs(centres - first - tap)))
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a = CUBIC
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)
