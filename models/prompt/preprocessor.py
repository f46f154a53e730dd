"""A checkpoint's own image settings: how pictures become the vision encoder's input.

Takes preprocessor_config.json and what the family's release does without it, returns the pixels that transformers'
processor of the same folder gives. What this toolkit cannot compute is refused by its name, at the first picture.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from models.errors import ModelError
from models.side_fields import shown
from models.side_files import Settings, is_there, read_as_stored, read_json

from .images import (
    CLIP_MEAN,
    CLIP_STD,
    as_array,
    crop_center,
    fit_pad,
    pad_square,
    shorter_edge_to,
    squash,
)

FILE = "preprocessor_config.json"
NESTED = "processor_config.json"  # transformers 5 writes the settings there, under NESTED_KEY
NESTED_KEY = "image_processor"
HALF = (0.5, 0.5, 0.5)
BILINEAR = Image.Resampling.BILINEAR
BICUBIC = Image.Resampling.BICUBIC
ROUNDING = 1e-7  # of float32: as far as two spellings of one number may be apart
CHANNELS = 3
# change pixels, although their names do not begin with do_
OTHER_FIELDS = ("crop_pct", "offset", "pad_size", "size_divisor", "use_square_size")
DONE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
ALWAYS_RGB = "do_convert_rgb"  # false makes a difference only where transformers fails
# what transformers' processors do where the file does not say
GENERAL = {
    "do_resize": True,
    "resample": BICUBIC,
    "default_to_square": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
}
CLIP = GENERAL | {
    "default_to_square": False,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
OF_224 = GENERAL | {
    "size": {"height": 224, "width": 224},
    "image_mean": HALF,
    "image_std": HALF,
}
BLIP = GENERAL | {
    "size": {"height": 384, "width": 384},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
PROCESSORS = {
    "CLIPImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "BitImageProcessor": CLIP,
    "BlipImageProcessor": BLIP,
    "SiglipImageProcessor": OF_224 | {"default_to_square": False},
    "ViTImageProcessor": OF_224 | {"resample": BILINEAR},
    "MllamaImageProcessor": OF_224 | {"resample": BILINEAR, "do_pad": True, "max_image_tiles": 4},
}
# of a processor that works in tiles: the one value of each that makes one tile
ONE_TILE = {"do_resize": True, "do_pad": True, "do_center_crop": False, "max_image_tiles": 1}


@dataclass(frozen=True)
class Release:
    """What a family's release does with a picture.

    processor: of transformers, meant where a file names none. settings: where there is no file.
    side: of the vision encoder's input, in pixels. mean, std: what its first layer applies.
    """

    processor: str
    settings: dict
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def squashed(side: int) -> Release:
    """Of GLM-4V and VisualGLM, whose releases have no such file: their code squashes the image."""
    return Release("BlipImageProcessor", {"size": side}, side, CLIP_MEAN, CLIP_STD)


def cropped(side: int) -> Release:
    """Of LLaVA: shorter edge to `side`, then the centre."""
    return Release(
        "CLIPImageProcessor", {"size": side, "crop_size": side}, side, CLIP_MEAN, CLIP_STD
    )


def padded(side: int) -> Release:
    """Of GLM-Edge-V: fitted into one tile of `side` x `side`, the rest zero."""
    settings = {"size": side, "resample": BICUBIC, "max_image_tiles": 1}
    return Release("MllamaImageProcessor", settings, side, HALF, HALF)


class ImageProcessor:
    """RGB images -> the vision encoder's input, by a folder's settings.

    ModelError for settings that this toolkit does not compute.
    """

    def __init__(self, directory: Path, release: Release):
        self._release = release
        self._file, given = given_settings(directory)
        kind = kind_of_processor(given, release.processor)
        if kind not in PROCESSORS:
            raise self._refused("image_processor_type", kind, f"use {release.processor}")
        defaults = PROCESSORS[kind]
        self._settings = defaults | (given or release.settings)
        self._tiles = "max_image_tiles" in defaults
        self._pads = kind == "LlavaImageProcessor" and self._settings["do_pad"]
        self._check(given)
        self._scale, self._shift = self._as_raw()

    def pixels(self, image: Image.Image) -> np.ndarray:
        """float32 [1, side, side, 3], on the scale 0..255 of the release.

        Other means, deviations and factors than the release's are folded in, so that the vision
        encoder's own first layer makes the values of transformers' processor of them.
        """
        side = self._release.side
        fitted = self._fitted(image)
        if fitted.size != (side, side):
            raise ModelError(
                f"{self._file} makes {fitted.width}x{fitted.height} of a picture of "
                f"{image.width}x{image.height}, the vision encoder takes {side}x{side}: set size "
                f"and crop_size to {side}, or take the file from the release"
            )
        values = as_array(fitted)
        if self._scale is None:
            return values
        return (values * self._scale + self._shift).astype(np.float32)

    def _fitted(self, image: Image.Image) -> Image.Image:
        settings = self._settings
        if self._tiles:
            return fit_pad(image, self._release.side, settings["resample"])
        if self._pads:
            image = pad_square(image, self._mean_colour())
        if settings["do_resize"]:
            image = self._resized(image)
        if settings["do_center_crop"]:
            image = crop_center(image, *_edges(settings["crop_size"]))
        return image

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self._settings["size"]
        resample = self._settings["resample"]
        if _is_shortest(size):
            return shorter_edge_to(image, size["shortest_edge"], resample)
        return squash(image, *_edges(size), resample)

    def _mean_colour(self) -> tuple[int, ...]:
        return tuple(int(255 * mean) for mean in _channels(self._settings["image_mean"]))

    # checks

    def _check(self, given: dict):
        settings = self._settings
        if is_number(settings["size"]) and not settings["default_to_square"]:
            settings["size"] = {"shortest_edge": settings["size"]}
        if self._tiles:
            self._check_tile()
        if settings["do_resize"] and not _is_shortest(settings["size"]):
            self._check_edges("size", last=not settings["do_center_crop"])
        if settings["do_center_crop"]:
            self._check_edges("crop_size", last=True)
        known = (*DONE, ALWAYS_RGB)
        for field, value in given.items():
            changes = field.startswith("do_") or field in OTHER_FIELDS
            pads = field == "do_pad" and not (self._pads or self._tiles)
            if value is not False and changes and (field not in known or pads):
                raise self._refused(field, value, "leave it out")

    def _check_edges(self, field: str, last: bool):
        """last: no step behind changes the size any more."""
        side = self._release.side
        edges = _edges(self._settings[field])
        if edges is None or (last and edges != (side, side)):
            raise self._refused(field, self._settings[field], f"use {side}")

    def _check_tile(self):
        for field, value in ONE_TILE.items():
            if self._settings[field] != value:
                raise self._refused(field, self._settings[field], f"use {shown(value)}")

    def _as_raw(self):
        """(scale, shift) [3] from raw 0..255 to what the release's mean and deviation turn into the
        settings' values; (None, None) if the settings are the release's."""
        factor = self._settings["rescale_factor"] if self._settings["do_rescale"] else 1.0
        mean = (0.0,) * CHANNELS
        std = (1.0,) * CHANNELS
        if self._settings["do_normalize"]:
            mean = _channels(self._settings["image_mean"])
            std = _channels(self._settings["image_std"])
        release = (1 / 255, *self._release.mean, *self._release.std)
        if _close((factor, *mean, *std), release):
            return None, None
        gain = np.divide(self._release.std, std)
        scale = 255 * factor * gain
        shift = 255 * (self._release.mean - mean * gain)
        return scale, shift

    def _refused(self, field: str, value, advice: str) -> ModelError:
        return ModelError(
            f"{self._file} says {field} {shown(value)}, which this toolkit does not compute: "
            f"{advice}, or take the file from the release"
        )


def given_settings(directory: Path) -> tuple[Path, dict]:
    """(the file that transformers reads, its fields; {} if there is none)"""
    nested = directory / NESTED
    if is_there(nested):
        settings = read_json(nested).get(NESTED_KEY)
        if settings is not None:
            return nested, _null_is_false(settings, read_as_stored(nested)[NESTED_KEY])
    file = directory / FILE
    if not is_there(file):
        return file, {}
    return file, _null_is_false(read_json(file), read_as_stored(file))


def _null_is_false(settings: Settings, stored: dict) -> Settings:
    """A step whose flag is null is left out, as by transformers; other nulls count as absent."""
    return settings | {field: False for field in DONE if field in stored and stored[field] is None}


def kind_of_processor(given: dict, default: str) -> str:
    """Name of the processor's class without what tells its backend or age."""
    kind = given.get("image_processor_type") or given.get("feature_extractor_type") or default
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    return kind.removesuffix("Fast").removesuffix("Pil")


def _is_shortest(size) -> bool:
    return isinstance(size, dict) and set(size) == {"shortest_edge"}


def _edges(size) -> tuple[int, int] | None:
    """(width, height) of a size that names both or is a square's; None for others."""
    if is_number(size):
        return size, size
    return (size["width"], size["height"]) if set(size) == {"width", "height"} else None


def _channels(value) -> tuple[float, ...]:
    """A mean or deviation of each channel."""
    return (value,) * CHANNELS if is_number(value) else tuple(value)


def _close(values: tuple[float, ...], others: tuple[float, ...]) -> bool:
    pairs = zip(values, others, strict=True)
    return all(math.isclose(value, other, rel_tol=ROUNDING) for value, other in pairs)


def is_number(value) -> bool:
    return isinstance(value, (int, float))
