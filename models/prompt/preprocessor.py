"""A checkpoint's own image settings: what preprocessor_config.json says against what is computed.

Takes a model directory and what a family does with an image, returns the settings that it may
choose from; whatever would give other pixels than transformers' processor is refused by its name.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from models.config import FRAMES, MERGE, PATCH
from models.errors import ModelError
from models.side_files import is_there, read_as_stored

from .images import CLIP_MEAN, CLIP_STD
from .patches import PatchRules

FILE = "preprocessor_config.json"
NESTED = "processor_config.json"  # transformers 5 writes the settings there, under NESTED_KEY
NESTED_KEY = "image_processor"
HALF = (0.5, 0.5, 0.5)
BILINEAR = 2
BICUBIC = 3  # PIL's number
ROUNDING = 1e-7  # of float32: as far as two spellings of one number may be apart
LONGEST_VALUE = 80  # characters of a value in a message
# change pixels, although their names do not begin with do_
OTHER_FIELDS = ("crop_pct", "offset", "pad_size", "size_divisor", "use_square_size")
SQUARES = ("crop_size", "pad_size")
PATCHED = ("Glm46VImageProcessor", "Glm4vImageProcessor")
PIXELS = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}  # of two frames
# what transformers' processors do where the file does not say
RGB = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
}
CLIP = RGB | {
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_pad": False,
}
PATCHES = RGB | {
    "resample": BICUBIC,
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
}
PROCESSORS = {
    **dict.fromkeys(PATCHED, PATCHES),
    "CLIPImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "BlipImageProcessor": RGB
    | {
        "resample": BICUBIC,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": 384, "width": 384},
    },
    "MllamaImageProcessor": RGB
    | {
        "resample": BILINEAR,
        "image_mean": HALF,
        "image_std": HALF,
        "size": {"height": 224, "width": 224},
        "do_pad": True,
        "max_image_tiles": 4,
    },
}


@dataclass(frozen=True)
class Preprocessing:
    """What a family does with an image, in the fields of preprocessor_config.json.

    processors: of transformers, whose settings it understands; the first is meant where the file
    names none. values: field -> the one value that is computed.
    """

    processors: tuple[str, ...]
    values: dict


def squashed(side: int) -> Preprocessing:
    """Of GLM-4V and VisualGLM, whose releases have no such file: their code squashes the image."""
    values = RGB | {
        "resample": BICUBIC,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": _square(side),
        "do_center_crop": False,
        "do_pad": False,
    }
    return Preprocessing(("BlipImageProcessor", "CLIPImageProcessor"), values)


def cropped(side: int) -> Preprocessing:
    """Of LLaVA: shorter edge to `side`, then the centre; `pads_to_square` may come before."""
    values = CLIP | {"size": {"shortest_edge": side}, "crop_size": _square(side)}
    return Preprocessing(("LlavaImageProcessor", "CLIPImageProcessor"), values)


def padded(side: int) -> Preprocessing:
    """Of GLM-Edge-V: fitted into one tile of `side` x `side`, the rest zero."""
    values = PROCESSORS["MllamaImageProcessor"] | {
        "resample": BICUBIC,
        "size": _square(side),
        "max_image_tiles": 1,
    }
    return Preprocessing(("MllamaImageProcessor",), values)


def check_preprocessor(directory: Path, name: str, wanted: Preprocessing):
    """ModelError for a setting of the directory that the family `name` does not compute.

    An absent field has the default of the processor that the file names; null is false, or no value.
    """
    file, given = _given(directory)
    if not given:
        return
    kind = _kind(given, wanted)
    if kind not in wanted.processors:
        raise _other(file, "image_processor_type", kind, name, " or ".join(wanted.processors))
    settings = PROCESSORS[kind] | given
    known = wanted.values
    if kind == "LlavaImageProcessor" and isinstance(given.get("do_pad"), bool):
        known = known | {"do_pad": given["do_pad"]}
    for field, value in known.items():
        setting = settings.get(field, False)
        if not _same(_plain(field, setting, value), _plain(field, value, value)):
            raise _other(file, field, setting, name, value)
    for field in _unknown_fields(given, known):
        raise _other(file, field, given[field], name, None)


def pads_to_square(directory: Path) -> bool:
    """Whether the image is padded to a square with the mean colour first (LlavaImageProcessor)."""
    return _given(directory)[1].get("do_pad") is True


def patch_rules(directory: Path, name: str) -> PatchRules:
    """Limits and normalisation of pictures of any size. ModelError for what is not computed."""
    check_preprocessor(directory, name, Preprocessing(PATCHED, PATCHES))
    file, given = _given(directory)
    size = PIXELS | (given.get("size") or {})
    limits = [given.get("min_pixels", size["shortest_edge"])]
    limits.append(given.get("max_pixels", size["longest_edge"]))
    if not all(map(_is_number, limits)) or not 0 < limits[0] <= limits[1]:
        raise ModelError(
            f"{file} limits pictures to {_short(limits)} pixels, which must be two numbers above 0, the "
            "smaller first; use the file of the release"
        )
    mean = _plain("image_mean", given.get("image_mean", CLIP_MEAN), CLIP_MEAN)
    std = _plain("image_std", given.get("image_std", CLIP_STD), CLIP_STD)
    return PatchRules(*limits, mean, std)


def _given(directory: Path) -> tuple[Path, dict]:
    """(the file that transformers reads, its fields; {} if there is none)"""
    file = directory / NESTED
    settings = _stored(file).get(NESTED_KEY)
    if settings is None:
        file = directory / FILE
        settings = _stored(file)
    if not isinstance(settings, dict):
        raise ModelError(
            f"{file} has {_short(settings)} where image settings belong; use the release's file"
        )
    return file, settings


def _stored(file: Path) -> dict:
    """With its nulls, which transformers takes for false in `do_center_crop` and the like."""
    return read_as_stored(file) if is_there(file) else {}


def _kind(given: dict, wanted: Preprocessing) -> str:
    """Name of the processor's class without what tells its backend or age."""
    kind = given.get("image_processor_type") or given.get("feature_extractor_type")
    if kind is None:
        return wanted.processors[0]
    kind = str(kind).replace("FeatureExtractor", "ImageProcessor")
    return kind.removesuffix("Fast").removesuffix("Pil")


def _unknown_fields(given: dict, known: dict) -> list[str]:
    """Fields that change pixels in a way that no family has."""
    found = []
    for field in given:
        changes = field.startswith("do_") or field in OTHER_FIELDS
        if changes and field not in known and given[field] not in (False, None):
            found.append(field)
    return found


def _plain(field: str, value, wanted):
    """A setting in its longest spelling: sizes by their edges, means by their channels."""
    if isinstance(wanted, tuple) and _is_number(value):
        return (value,) * len(wanted)
    if isinstance(wanted, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(wanted, dict) and _is_number(value):
        shortest = "shortest_edge" in wanted and field not in SQUARES
        return {"shortest_edge": value} if shortest else _square(value)
    if isinstance(wanted, dict) and isinstance(value, dict):
        return {edge: length for edge, length in value.items() if length is not None}
    return value


def _same(given, wanted) -> bool:
    if isinstance(wanted, bool) or isinstance(given, bool):
        return given is wanted or (given is None and wanted is False)
    if isinstance(wanted, tuple):
        equal = isinstance(given, tuple) and len(given) == len(wanted)
        return equal and all(map(_same, given, wanted))
    if _is_number(given) and _is_number(wanted):
        return math.isclose(given, wanted, rel_tol=ROUNDING)
    return given == wanted


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def _other(file: Path, field: str, given, name: str, wanted) -> ModelError:
    only = "without it" if wanted is None else f"with {_short(wanted)} only"
    return ModelError(
        f"{file} says {field} {_short(given)}, which gives other pixels: {name} is computed {only}; "
        "use the file of the release"
    )
