"""preprocessor_config.json decides about pixels as transformers' processors do, or is refused by the name of its field."""

import json
import shutil

import numpy as np
import paths
import pytest
from PIL import Image

from models import family_of
from models.errors import ModelError
from models.prompt.images import ImageTooLarge, pad_square

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


def values_of(folder, image):
    """What the vision encoder's first layer makes of our pixels, as transformers has it."""
    family = family_of(folder)
    raw = family.pixels(image)
    assert raw.dtype == np.float32
    release = family.image_processor._release
    return ((raw / 255 - np.float32(release.mean)) / np.float32(release.std)).transpose(0, 3, 1, 2)


def check_against_transformers(folder, image):
    ours = values_of(folder, image)
    theirs = expected(folder, image).reshape(ours.shape)
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())


SQUARE = {"height": 56, "width": 56}
GENERAL = [
    {},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.2, 0.9]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"rescale_factor": 1 / 127.5},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_normalize": None},
    {"do_rescale": None},
    {"do_convert_rgb": None, "crop_size": 56},
    {"do_convert_rgb": False},
    *({"resample": resample} for resample in range(6)),
]
LLAVA = [
    {"size": 56, "crop_size": 56},
    {"size": SQUARE, "do_center_crop": False},
    {"size": SQUARE},
    {"size": {"shortest_edge": 64}},
    {"size": {"shortest_edge": 40}},
    {"size": {"height": 70, "width": 90}},
    {"do_resize": False},
    {"do_resize": None},
    {"pad_size": None, "size_divisor": None, "do_thumbnail": None},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": False},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": [0.5, 0.1, 0.9]},
    {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_resize": False},
    {"image_processor_type": "CLIPImageProcessorFast", "do_pad": None},
    {"image_processor_type": "CLIPImageProcessorPil"},
    {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    {"image_processor_type": "ViTImageProcessor", "size": 56},
    {"image_processor_type": "BlipImageProcessor", "size": SQUARE},
    {"image_processor_type": "BitImageProcessor"},
]
CASES = [(name, settings) for name in ("llava", "glm_edge_v") for settings in GENERAL]
CASES += [("llava", settings) for settings in LLAVA]
CASES += [
    ("glm_edge_v", {"image_processor_type": "SiglipImageProcessor", "do_pad": False}),
    (
        "glm_edge_v",
        {"image_processor_type": "CLIPImageProcessor", "crop_size": 56, "do_pad": False},
    ),
]


@pytest.mark.parametrize("size", [(200, 90), (45, 100), (33, 34), (64, 64)])
@pytest.mark.parametrize("name, settings", CASES)
def test_pixels_are_those_of_transformers(tmp_path, name, settings, size):
    check_against_transformers(checkpoint(tmp_path, name, **settings), picture(size))


@pytest.mark.parametrize("name", ["glm4v", "visualglm"])
@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.5] * 3}, {"resample": 2}])
def test_a_file_beside_a_release_without_one_decides(tmp_path, name, settings):
    side = SIDES[name]
    size = {"height": side, "width": side}
    settings = {"image_processor_type": "BlipImageProcessor", "size": size} | settings
    check_against_transformers(checkpoint(tmp_path, name, **settings), picture((90, 40)))


def test_nested_settings_of_transformers_5_come_first(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    folder = checkpoint(tmp_path, "llava")
    nested = json.loads((folder / FILE).read_text())
    nested |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "resample": 2}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    check_against_transformers(folder, picture((200, 90)))
    nested["resample"] = 7
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    with pytest.raises(ModelError, match="processor_config.json says image_processor.resample 7"):
        family_of(folder).pixels(picture((200, 90)))


OTHER_PIXELS = {
    "llava": [
        {"do_pad": True},  # CLIP's processor has no such way
        {"crop_size": {"height": 64, "width": 64}},
        {"crop_size": 64},
        {"size": {"shortest_edge": 56, "longest_edge": 90}},
        {"size": {"height": 56}},
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"do_thumbnail": True},
        {"use_square_size": True},
    ],
    "glm_edge_v": [
        {"do_pad": False},
        {"do_resize": False},
        {"size": {"height": 64, "width": 64}},
        {"max_image_tiles": 4},
        {"image_processor_type": "Idefics3ImageProcessor"},
    ],
    "glm4v": [
        {"do_center_crop": False, "size": {"height": 64, "width": 64}},
        {"size": 56, "do_pad": True},
    ],
    "visualglm": [
        {"size": {"height": 384, "width": 384}},
        {"size": 224, "do_pad": True},
    ],
}
OF_ALL = [
    {"image_mean": [0.5]},
    {"image_mean": [0.5, 0.5, float("nan")]},
    {"image_mean": {}},
    {"image_std": "0.5"},
    {"image_std": [0.5, 0.5, 0.0]},
    {"do_resize": "true"},
    {"do_normalize": 1},
    {"resample": "bicubic"},
    {"resample": 6},
    {"rescale_factor": "1/255"},
    {"size": "56"},
    {"size": {"height": "56", "width": 56}},
    {"size": {"height": 0, "width": 56}},
    {"image_processor_type": 5},
    {"do_something_new": True},
]
REFUSED = [(name, settings) for name, cases in OTHER_PIXELS.items() for settings in cases]
REFUSED += [(name, settings) for name in SIDES for settings in OF_ALL]


@pytest.mark.parametrize("name, settings", REFUSED)
def test_what_is_not_computed_is_refused_by_its_name_with_the_first_picture(
    tmp_path, name, settings
):
    released = {} if name in ("llava", "glm_edge_v") else {"size": SIDES[name]}
    family = family_of(checkpoint(tmp_path, name, **(released | settings)))
    field = list(settings)[-1]
    with pytest.raises(ModelError, match=f"{FILE} says {field}"):
        family.pixels(picture((60, 70)))


@pytest.mark.parametrize(
    "name, field, words",
    [("llava", "size", "makes 56x56|makes 224x|crop"), ("glm_edge_v", "size", "says size")],
)
def test_an_absent_field_means_the_default_of_the_processor(tmp_path, name, field, words):
    folder = checkpoint(tmp_path, name, removed=[field])
    if name == "llava":
        check_against_transformers(folder, picture((60, 70)))
    else:
        with pytest.raises(ModelError, match=words):
            family_of(folder).pixels(picture((60, 70)))


def test_a_size_that_the_encoder_does_not_take_is_told_with_the_picture(tmp_path):
    folder = checkpoint(tmp_path, "llava", do_center_crop=False)
    with pytest.raises(ModelError, match="makes 65x56 of a picture of 70x60, .* takes 56x56"):
        family_of(folder).pixels(picture((70, 60)))
    check_against_transformers(folder, picture((70, 70)))


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(
    "content", ["[]", '{"do_resize": 5}', '{"image_processor_type": "X"}', "{"]
)
def test_a_use_without_pictures_does_without_the_file(tmp_path, name, content):
    folder = checkpoint(tmp_path, name)
    (folder / FILE).write_text(content)
    try:
        family_of(folder).prompt([{"role": "user", "content": "hello"}], "zh")
    except ModelError as error:
        assert "have no" in str(error)  # the golden GLM-4V has no special tokens
    with pytest.raises(ModelError, match=FILE):
        family_of(folder).pixels(picture((60, 70)))


def test_settings_that_are_no_fields_are_refused(tmp_path):
    folder = checkpoint(tmp_path, "llava")
    (folder / "processor_config.json").write_text('{"image_processor": "CLIP"}')
    with pytest.raises(ModelError, match="processor_config.json says image_processor 'CLIP'"):
        family_of(folder).pixels(picture((60, 70)))


def test_a_square_too_large_is_refused():
    with pytest.raises(ImageTooLarge, match="becomes a square of 400,000,000 pixels"):
        pad_square(Image.new("L", (20_000, 20)).convert("RGB"), (1, 2, 3))
