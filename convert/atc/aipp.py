"""AIPP, the NPU's image preprocessing: its configuration file, and the same arithmetic in numpy.

Takes a family whose tower normalises its input once, returns the file that has AIPP do it in front
of the graph.
"""

import numpy as np
import torch

from models.family import Family
from models.network.vision_blocks import Normalize
from runtime.common.errors import ToolkitError

MAX_SIDE = 4096  # pixels, of AIPP's source image


def normalization(family: Family) -> tuple[str, Normalize]:
    """(path, module) of the tower's only Normalize; ToolkitError if AIPP cannot stand in for it."""
    with torch.device("meta"):
        tower = family.vision_encoder()
    found = []
    for path, module in tower.named_modules():
        if isinstance(module, Normalize):
            found.append((path, module))
    side = max(family.vision.input_shape[1:3])
    if len(found) != 1 or side > MAX_SIDE:
        raise ToolkitError(
            f"--aipp does not fit {family.name}: it needs one normalisation at the input and pictures "
            f"of up to {MAX_SIDE} pixels, there are {len(found)} and {side}; leave --aipp out"
        )
    return found[0]


def aipp_config(family: Family) -> str:
    """AIPP file: uint8 RGB NHWC in, (x - mean - min) * var_reci per channel out, as NCHW.

    The mean is split into a whole number and a rest, because AIPP holds the rest in fp16:
    122 + 0.7709 is exact to 0.0005, 122.7709 only to 0.06.
    """
    _, height, width, _ = family.vision.input_shape
    _, module = normalization(family)
    lines = [
        "aipp_mode: static",
        "related_input_rank: 0",
        "input_format: RGB888_U8",
        f"src_image_size_w: {width}",
        f"src_image_size_h: {height}",
        "crop: false",
        "padding: false",
        "csc_switch: false",
        "rbuv_swap_switch: false",
    ]
    for channel, (mean, std) in enumerate(zip(module.mean, module.std)):
        whole, rest = divmod(255 * mean, 1)
        lines += [
            f"mean_chn_{channel}: {int(whole)}",
            f"min_chn_{channel}: {rest:.8g}",
            f"var_reci_chn_{channel}: {1 / (255 * std):.8g}",
        ]
    return "aipp_op {\n" + "".join(f"    {line}\n" for line in lines) + "}\n"


def apply_aipp(config: str, pixels: np.ndarray, dtype=np.float32) -> np.ndarray:
    """What AIPP makes of raw pixels with the numbers of its file.

    [n, H, W, 3], whole numbers 0..255 -> [n, 3, H, W] of `dtype`
    """
    values = dict(line.strip().split(": ") for line in config.splitlines() if ": " in line)
    mean = _per_channel(values, "mean", dtype)
    rest = _per_channel(values, "min", dtype)
    scale = _per_channel(values, "var_reci", dtype)
    normalised = (pixels.astype(dtype) - mean - rest) * scale
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))


def _per_channel(values: dict[str, str], name: str, dtype) -> np.ndarray:
    numbers = [float(values[f"{name}_chn_{channel}"]) for channel in range(3)]
    return np.array(numbers, np.float64).astype(dtype)
