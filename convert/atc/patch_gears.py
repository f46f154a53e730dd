"""Gears of an encoder of pictures of any size: the numbers of patches that its .om is compiled for.

Takes what the user wants and the limits of a family, returns ATC's options. A picture runs in the
smallest gear that holds it, filled up with patches that it does not attend to.
"""

from models.config import BLOCK_PATCHES, PatchSpec
from models.family import Family
from runtime.common.errors import ToolkitError

# sides of squares, in patches; the last holds a page of 1,200 x 1,600 pixels. An .om takes the memory of its
# largest gear, which grows with the square of the patches.
SIDES = (16, 32, 48, 64, 80, 104)


def default_gears(family: Family) -> tuple[int, ...]:
    """Squares up to the largest picture that the family makes."""
    most = family.patch_rules.most_patches
    gears = [side**2 for side in SIDES if side**2 < most]
    if len(gears) < len(SIDES):
        gears.append(most // BLOCK_PATCHES * BLOCK_PATCHES)
    return tuple(gears) if len(gears) > 1 else (BLOCK_PATCHES, *gears)


def shape_options(spec: PatchSpec, gears: tuple[int, ...]) -> dict[str, str]:
    """ATC's options for inputs [patches, width] in gears; every free dimension is one number of a
    gear."""
    shapes = [f"{name}:-1,{width}" for name, width in spec.widths.items()]
    steps = [",".join([str(gear)] * len(shapes)) for gear in gears]
    return {
        "input_format": "ND",
        "input_shape": ";".join(shapes),
        "dynamic_dims": ";".join(steps),
        "input_fp16_nodes": ";".join(spec.widths),
    }


def check_gears(family: Family, gears: tuple[int, ...], patch_gears: tuple[int, ...], aipp: bool):
    """ToolkitError for options that are not those of the family's kind of pictures."""
    any_size = isinstance(family.vision, PatchSpec)
    if any_size and (gears or aipp):
        option = "--aipp" if aipp else "--dynamic-batch"
        raise ToolkitError(
            f"{option} is for pictures of one size; {family.name} takes any size, in --gears of patches"
        )
    if patch_gears and not any_size:
        raise ToolkitError(
            f"--gears is for pictures of any size; those of {family.name} have one, use --dynamic-batch"
        )
