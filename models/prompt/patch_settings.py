"""Image settings of the families whose pictures keep their size: limits and normalisation of preprocessor_config.json.

Takes a model directory, returns PatchRules; whatever would give other pixels than transformers' processor is refused by
its name.
"""

import math
from pathlib import Path

from models.config import FRAMES, MERGE, PATCH
from models.errors import ModelError
from models.side_fields import shown

from .images import BICUBIC, CLIP_MEAN, CLIP_STD
from .patches import PatchRules
from .preprocessor import OTHER_FIELDS, given_settings, is_number, kind_of_processor

ROUNDING = 1e-7  # of float32: as far as two spellings of one number may be apart
PROCESSORS = ("Glm46VImageProcessor", "Glm4vImageProcessor")
PIXELS = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}  # of two frames
# what transformers' processor does where the file does not say, and what is computed
COMPUTED = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": BICUBIC,
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
}


def patch_rules(directory: Path, name: str) -> PatchRules:
    """Limits and normalisation of pictures of any size. ModelError for what is not computed."""
    file, given = given_settings(directory)
    _check(file, given, name)
    size = PIXELS | (given.get("size") or {})
    limits = [given.get("min_pixels", size["shortest_edge"])]
    limits.append(given.get("max_pixels", size["longest_edge"]))
    if not all(map(is_number, limits)) or not 0 < limits[0] <= limits[1]:
        raise ModelError(
            f"{file} limits pictures to {shown(limits)} pixels, which must be two numbers above 0, the "
            "smaller first; use the file of the release"
        )
    mean = given.get("image_mean", CLIP_MEAN)
    std = given.get("image_std", CLIP_STD)
    return PatchRules(*limits, _channels(mean), _channels(std))


def _check(file: Path, given: dict, name: str):
    kind = kind_of_processor(given, PROCESSORS[0])
    if kind not in PROCESSORS:
        raise _other(file, "image_processor_type", kind, name, " or ".join(PROCESSORS))
    for field, value in COMPUTED.items():
        setting = given.get(field, value)
        if not _same(setting, value):
            raise _other(file, field, setting, name, value)
    for field, value in given.items():
        changes = field.startswith("do_") or field in OTHER_FIELDS
        if changes and field not in COMPUTED and value is not False:
            raise _other(file, field, value, name, None)


def _channels(value) -> tuple[float, ...]:
    return (value,) * 3 if is_number(value) else tuple(value)


def _same(given, wanted) -> bool:
    if isinstance(wanted, bool) or isinstance(given, bool):
        return given is wanted
    if is_number(given) and is_number(wanted):
        return math.isclose(given, wanted, rel_tol=ROUNDING)
    return given == wanted


def _other(file: Path, field: str, given, name: str, wanted) -> ModelError:
    only = "without it" if wanted is None else f"with {shown(wanted)} only"
    return ModelError(
        f"{file} says {field} {shown(given)}, which gives other pixels: {name} is computed {only}; "
        "use the file of the release"
    )
