"""preprocessor_config.json decides about pixels as transformers' processors do, or is refused by the name of its field."""

import json
import shutil

import numpy as np
import paths
import pytest
from PIL import Image

from models import family_of
from models.errors import ModelError
from models.prompt.images import CLIP_MEAN, CLIP_STD, ImageTooLarge, pad_square

FILE = "preprocessor_config.json"
SIDES = {"llava": 56, "glm_edge_v": 56, "glm4v": 56, "visualglm": 224}


def checkpoint(tmp_path, name, removed=(), **settings):
    """A copy of a golden checkpoint's small files, with other image settings."""
    folder = tmp_path / name
    shutil.copytree(
        paths.GOLDEN / name, folder, ignore=shutil.ignore_patterns("*.npz", "*.safetensors", "hf")
    )
    file = folder / FILE
    content = json.loads(file.read_text()) if file.is_file() else {}
    content |= settings
    for field in removed:
        del content[field]
    file.write_text(json.dumps(content))
    return folder


def picture(size):
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def expected(folder, image):
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    return processor(image, return_tensors="np").pixel_values


@pytest.mark.parametrize("size", [(200, 90), (45, 100), (33, 34), (64, 64)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 56, "crop_size": 56},
        {"pad_size": None, "size_divisor": None, "do_thumbnail": None},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": False},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
        {"image_processor_type": "CLIPImageProcessorFast", "do_pad": None},
    ],
)
def test_llava_has_the_pixels_of_transformers(tmp_path, settings, size):
    folder = checkpoint(tmp_path, "llava", **settings)
    raw = family_of(folder).pixels(picture(size))
    ours = ((raw / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(0, 3, 1, 2)
    assert np.abs(ours - expected(folder, picture(size))).max() < 1e-6


def test_nested_settings_of_transformers_5_come_first(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    folder = checkpoint(tmp_path, "llava")
    nested = json.loads((folder / FILE).read_text())
    nested |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    raw = family_of(folder).pixels(picture((200, 90)))
    ours = ((raw / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(0, 3, 1, 2)
    assert np.abs(ours - expected(folder, picture((200, 90)))).max() < 1e-6
    nested["resample"] = 2
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    with pytest.raises(ModelError, match="processor_config.json says resample 2"):
        family_of(folder)


OTHER_PIXELS = {
    "llava": [
        {"do_pad": True},  # CLIP's processor has no such way
        {"size": {"height": 56, "width": 56}},
        {"size": {"shortest_edge": 64}},
        {"crop_size": {"height": 64, "width": 64}},
        {"crop_size": 64},
        {"do_center_crop": False},
        {"resample": 2},
        {"image_processor_type": "SiglipImageProcessor"},
        {"do_thumbnail": True},
    ],
    "glm_edge_v": [
        {"do_pad": False},
        {"size": {"height": 64, "width": 64}},
        {"resample": 2},
        {"max_image_tiles": 4},
        {"image_processor_type": "LlavaImageProcessor"},
    ],
    "glm4v": [
        {"size": {"height": 56, "width": 56}, "do_center_crop": True},
        {"size": {"shortest_edge": 56}},
        {"size": {"height": 56, "width": 56}, "resample": 2},
    ],
    "visualglm": [
        {"size": {"height": 384, "width": 384}},
        {"size": 224, "do_pad": True},
    ],
}
OF_ALL = [
    {"image_mean": [0.4, 0.5, 0.5]},
    {"image_std": 0.25},
    {"image_mean": [0.5]},
    {"image_std": "0.5"},
    {"rescale_factor": 1 / 127.5},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_resize": False},
    {"do_convert_rgb": False},
    {"do_resize": "true"},
    {"do_normalize": None},
    {"image_mean": None},
]
REFUSED = [(name, settings) for name, cases in OTHER_PIXELS.items() for settings in cases]
REFUSED += [(name, settings) for name in SIDES for settings in OF_ALL]


@pytest.mark.parametrize("name, settings", REFUSED)
def test_a_setting_that_gives_other_pixels_is_refused_by_its_name(tmp_path, name, settings):
    side = SIDES[name]
    released = {} if name in ("llava", "glm_edge_v") else {"size": side}
    folder = checkpoint(tmp_path, name, **(released | settings))
    field = list(settings)[-1]
    with pytest.raises(ModelError, match=f"{FILE} says {field} .* other pixels"):
        family_of(folder)


@pytest.mark.parametrize("name, field", [("llava", "size"), ("glm_edge_v", "resample")])
def test_an_absent_field_means_the_default_of_the_processor(tmp_path, name, field):
    with pytest.raises(ModelError, match=f"says {field} "):
        family_of(checkpoint(tmp_path, name, removed=[field]))


@pytest.mark.parametrize("name", ["glm4v", "visualglm"])
def test_settings_as_the_release_computes_are_taken(tmp_path, name):
    side = SIDES[name]
    size = {"height": side, "width": side}
    folder = checkpoint(tmp_path, name, size=size, image_processor_type="BlipImageProcessor")
    raw = family_of(folder).pixels(picture((90, 40)))
    ours = ((raw / 255 - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(0, 3, 1, 2)
    assert np.abs(ours - expected(folder, picture((90, 40)))).max() < 1e-6


def test_settings_that_are_no_fields_are_refused(tmp_path):
    folder = checkpoint(tmp_path, "llava")
    (folder / "processor_config.json").write_text('{"image_processor": "CLIP"}')
    with pytest.raises(ModelError, match="processor_config.json has 'CLIP'"):
        family_of(folder)


def test_a_square_too_large_is_refused():
    with pytest.raises(ImageTooLarge, match="becomes a square of 400,000,000 pixels"):
        pad_square(Image.new("L", (20_000, 20)).convert("RGB"), (1, 2, 3))
