"""Pictures: the pixels of the original preprocessors, bit by bit, and a sentence for whatever is not a picture."""

import io
import struct
import zlib

import numpy as np
import paths
import pytest
from PIL import Image

from models.errors import ModelError
from models.prompt.images import (
    CLIP_MEAN,
    CLIP_STD,
    center_crop,
    denormalize,
    fit_pad,
    open_image,
    squash,
)

GOLDEN = paths.GOLDEN
HALF = (0.5, 0.5, 0.5)


def normalized(raw, mean, std):
    return ((raw / 255 - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)


def test_squash_is_the_pixels_of_visualglm():
    golden = np.load(GOLDEN / "visualglm" / "golden.npz")
    raw = squash(open_image(GOLDEN / "visualglm" / "image.png"), 224)
    assert raw.dtype == np.float32 and np.array_equal(raw, golden["nhwc_input"])
    assert np.array_equal(
        denormalize(golden["pixel_values"], CLIP_MEAN, CLIP_STD, (1, 224, 224, 3)), raw
    )


@pytest.mark.parametrize("k, name", enumerate(["image_a.png", "image_b.png"]))
def test_center_crop_is_the_pixels_of_llava(k, name):
    golden = np.load(GOLDEN / "llava" / "golden_two_images.npz")["pixel_values"][k : k + 1]
    raw = center_crop(open_image(GOLDEN / "llava" / name), 56)
    assert np.abs(normalized(raw, CLIP_MEAN, CLIP_STD) - golden).max() < 1e-6


@pytest.mark.parametrize(
    "case, name", [("golden", "image_a.png"), ("golden_textfirst_smallimage", "image_b.png")]
)
def test_fit_pad_is_the_pixels_of_glm_edge_v(case, name):
    golden = np.load(GOLDEN / "glm_edge_v" / f"{case}.npz")["pixel_values"].reshape(1, 3, 56, 56)
    raw = fit_pad(open_image(GOLDEN / "glm_edge_v" / name), 56)
    assert np.abs(normalized(raw, HALF, HALF) - golden).max() < 1e-6


def picture(mode="RGB", size=(30, 20)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I", "F", "CMYK"])
def test_every_mode_becomes_rgb_by_convert(mode):
    image = picture(mode)
    opened = open_image(image)
    assert opened.mode == "RGB" and np.array_equal(opened, image.convert("RGB"))


def test_alpha_is_dropped_not_blended():
    image = picture()
    image.putalpha(0)
    assert np.array_equal(open_image(encoded(image)), picture())


def test_sixteen_bit_grey_and_animation():
    assert open_image(encoded(Image.fromarray(np.full((4, 4), 300, np.uint16)))).size == (4, 4)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_camera_rotation_is_applied_unless_asked_not_to():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    photo = encoded(picture(), exif=exif)
    assert np.array_equal(open_image(photo), picture().transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(open_image(photo, upright=False), picture())


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (5000, 3)])
@pytest.mark.parametrize("resize", [squash, center_crop, fit_pad])
def test_odd_sizes_give_the_encoders_shape(resize, size):
    raw = resize(open_image(picture(size=size)), 28)
    assert (
        raw.shape == (1, 28, 28, 3)
        and raw.dtype == np.float32
        and raw.min() >= 0
        and raw.max() <= 255
    )


def test_too_narrow_to_crop():
    with pytest.raises(ModelError, match="too narrow"):
        center_crop(Image.new("RGB", (1, 60000)), 336)


def huge_png() -> bytes:
    """30000 x 30000 by its header; no pixel data worth the name."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "source, words",
    [
        ("/no/such/picture.png", "does not exist"),
        (str(GOLDEN), "is a directory"),
        (str(GOLDEN / "visualglm" / "config.json"), "is not a picture"),
        (b"", "is not a picture"),
        (b"hello", "is not a picture"),
        (encoded(picture())[:300], "is damaged or truncated"),
        (encoded(picture(), "JPEG")[:700], "is damaged or truncated"),
        (huge_png(), "has 900,000,000 pixels, the limit is 178,956,970"),
    ],
)
def test_what_is_no_usable_picture_gets_one_sentence(source, words):
    with pytest.raises(ModelError, match=words) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 3, 8, 9), np.float32),
        np.zeros((3, 8, 8), np.float32),
        np.zeros((1, 3, 8, 8), np.uint8),
    ],
)
def test_preprocessed_pixels_must_fit(pixels):
    with pytest.raises(ModelError, match="expected normalised float values"):
        denormalize(pixels, CLIP_MEAN, CLIP_STD, (1, 8, 8, 3))


def test_any_values_survive_denormalising():
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    back = normalized(denormalize(pixels, CLIP_MEAN, CLIP_STD, (1, 8, 8, 3)), CLIP_MEAN, CLIP_STD)
    assert np.abs(back - pixels).max() < 1e-6
