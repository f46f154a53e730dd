"""Pictures: the pixels of the original preprocessors, bit by bit, and a sentence for whatever is not a picture."""

import io
import os
import struct
import zlib

import numpy as np
import paths
import pytest
from PIL import Image, ImageOps

from models.errors import ModelError
from models.prompt.images import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTooLarge,
    as_array,
    crop_center,
    denormalize,
    fit_pad,
    open_image,
    pad_square,
    shorter_edge_to,
    squash,
)

GOLDEN = paths.GOLDEN
HALF = (0.5, 0.5, 0.5)


def center_crop(image, side):
    return crop_center(shorter_edge_to(image, side), side, side)


def normalized(raw, mean, std):
    return ((raw / 255 - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)


def test_squash_is_the_pixels_of_visualglm():
    golden = np.load(GOLDEN / "visualglm" / "golden.npz")
    raw = as_array(squash(open_image(GOLDEN / "visualglm" / "image.png"), 224, 224))
    assert raw.dtype == np.float32 and np.array_equal(raw, golden["nhwc_input"])
    assert np.array_equal(
        denormalize(golden["pixel_values"], CLIP_MEAN, CLIP_STD, (1, 224, 224, 3)), raw
    )


@pytest.mark.parametrize("k, name", enumerate(["image_a.png", "image_b.png"]))
def test_center_crop_is_the_pixels_of_llava(k, name):
    golden = np.load(GOLDEN / "llava" / "golden_two_images.npz")["pixel_values"][k : k + 1]
    raw = as_array(center_crop(open_image(GOLDEN / "llava" / name), 56))
    assert np.abs(normalized(raw, CLIP_MEAN, CLIP_STD) - golden).max() < 1e-6


@pytest.mark.parametrize(
    "case, name", [("golden", "image_a.png"), ("golden_textfirst_smallimage", "image_b.png")]
)
def test_fit_pad_is_the_pixels_of_glm_edge_v(case, name):
    golden = np.load(GOLDEN / "glm_edge_v" / f"{case}.npz")["pixel_values"].reshape(1, 3, 56, 56)
    raw = as_array(fit_pad(open_image(GOLDEN / "glm_edge_v" / name), 56))
    assert np.abs(normalized(raw, HALF, HALF) - golden).max() < 1e-6


def picture(mode="RGB", size=(30, 20)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_mode_becomes_rgb_by_convert(mode):
    image = picture(mode)
    opened = open_image(image)
    assert opened.mode == "RGB" and np.array_equal(opened, image.convert("RGB"))


def test_alpha_is_dropped_not_blended():
    image = picture()
    image.putalpha(0)
    assert np.array_equal(open_image(encoded(image)), picture())


def grey_tiff(bits: int, white: int, data: bytes, sample_format: int = 1) -> bytes:
    """4 x 4 values; white: 1, or 0 for the largest value."""
    tags = [
        (256, 4),
        (257, 4),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 200),
        (277, 1),
        (278, 4),
        (279, len(data)),
        (339, sample_format),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, value in tags:
        head += struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value)
    return (head + bytes(4)).ljust(200, b"\0") + data


SIXTEEN = [0, 300, 32896, 65535] * 4
SCALED = [0, 1, 128, 255]


@pytest.mark.parametrize(
    "source, expected",
    [
        (encoded(Image.fromarray(np.array(SIXTEEN, np.uint16).reshape(4, 4))), SCALED),
        (encoded(Image.fromarray(np.array(SIXTEEN, np.uint16).reshape(4, 4)), "TIFF"), SCALED),
        (Image.fromarray(np.array(SIXTEEN, np.uint16).reshape(4, 4)), SCALED),
        (Image.frombytes("I;16B", (4, 4), np.array(SIXTEEN, ">u2").tobytes()), SCALED),
        (grey_tiff(16, 1, np.array(SIXTEEN, "<u2").tobytes()), SCALED),
        (grey_tiff(16, 0, np.array(SIXTEEN, "<u2").tobytes()), [255, 254, 127, 0]),
        (grey_tiff(12, 1, b"\xff\xf0\0" * 8), [255, 0, 255, 0]),
    ],
)
def test_more_than_8_bits_are_scaled(source, expected):
    opened = open_image(source)
    assert opened.mode == "RGB"
    assert np.asarray(opened)[0].tolist() == [[value] * 3 for value in expected]


def test_a_palette_with_alpha():
    image = picture("P")
    image.info["transparency"] = bytes(range(256))
    assert np.array_equal(open_image(encoded(image)), picture("P").convert("RGB"))
    mixed = picture("P").convert("PA")
    assert np.array_equal(open_image(mixed), picture("P").convert("RGB"))


@pytest.mark.parametrize(
    "source, words",
    [
        (picture("I"), "nothing says which value is white"),
        (picture("F"), "nothing says which value is white"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "save it with 8 bits"),
        (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "save it with 8 bits"),
        (grey_tiff(16, 1, bytes(32), 2), "save it with 8 bits"),
        (grey_tiff(64, 1, bytes(128), 3), "is not a picture that can be read"),
        (picture("LA").convert("La"), "colours of the kind La"),
    ],
)
def test_values_without_a_known_white_are_refused(source, words):
    with pytest.raises(ModelError, match=words):
        open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(kind):
    more = {}
    if kind == "MPO":
        more = {"save_all": True, "append_images": [picture()]}
    assert open_image(encoded(picture(), kind, **more)).size == (30, 20)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "JPEG2000", "PCX", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(ModelError, match="use PNG, JPEG, WebP, BMP, GIF or TIFF"):
        open_image(encoded(picture(), kind))


def test_no_other_program_is_started(tmp_path, monkeypatch):
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\necho 10.0\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    file = tmp_path / "cat.png"
    file.write_bytes(encoded(picture(), "EPS"))
    with pytest.raises(ModelError, match="is not a picture"):
        open_image(file)
    assert not (tmp_path / "called").exists()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_camera_rotation_is_applied_unless_asked_not_to():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    photo = encoded(picture(), exif=exif)
    assert np.array_equal(open_image(photo), picture().transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(open_image(photo, upright=False), picture())


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_rotation_is_pils(value, kind):
    exif = Image.Exif()
    exif[0x0112] = value
    more = {"lossless": True} if kind == "WEBP" else {}
    photo = encoded(picture(), kind, exif=exif, **more)
    with Image.open(io.BytesIO(photo)) as opened:
        expected = ImageOps.exif_transpose(opened)
    assert np.array_equal(open_image(photo), expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0", b"Exif\0\0??????????????", b"\0"])
def test_a_damaged_exif_block_harms_no_pixel(exif):
    photo = encoded(picture(), "PNG", exif=exif)
    assert np.array_equal(open_image(photo), picture())


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (5000, 3)])
@pytest.mark.parametrize(
    "resize", [lambda image, side: squash(image, side, side), center_crop, fit_pad]
)
def test_odd_sizes_give_the_encoders_shape(resize, size):
    raw = as_array(resize(open_image(picture(size=size)), 28))
    assert (
        raw.shape == (1, 28, 28, 3)
        and raw.dtype == np.float32
        and raw.min() >= 0
        and raw.max() <= 255
    )


def test_too_narrow_to_crop():
    with pytest.raises(ModelError, match="too narrow"):
        shorter_edge_to(Image.new("RGB", (1, 60000)), 336)
    with pytest.raises(ModelError, match="longer edge would become 504,000 pixels"):
        shorter_edge_to(Image.new("RGB", (1500, 1)), 336)


def test_a_narrow_picture_makes_no_huge_square():
    with pytest.raises(ImageTooLarge, match="a square of 169,000,000 pixels, the limit is 16,777"):
        pad_square(Image.new("RGB", (13_000, 7)), (0, 0, 0))
    assert pad_square(Image.new("RGB", (4_000, 2)), (0, 0, 0)).size == (4_000, 4_000)
    assert pad_square(Image.new("RGB", (5_000, 2_500)), (0, 0, 0)).size == (5_000, 5_000)


def huge_png(width=30_000, height=30_000) -> bytes:
    """So large by its header; no pixel data worth the name."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
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
        (str(GOLDEN), "is a folder; name one picture"),
        (str(GOLDEN / "visualglm" / "config.json"), "is not a picture"),
        (b"", "is not a picture"),
        (b"hello", "is not a picture"),
        (encoded(picture())[:300], "is damaged or truncated"),
        (encoded(picture(), "JPEG")[:700], "is damaged or truncated"),
        (huge_png(), "has 900,000,000 pixels, the limit is 178,956,970"),
        (huge_png(1, 49_999_999), "has 1 x 49999999 pixels, the limit is 65,535 for a side"),
        (huge_png(65_536, 64), "the limit is 65,535 for a side"),
        (huge_png(60_000, 10), "too narrow with 60000 x 10 pixels: the limit is 2,000 times"),
        (Image.new("RGB", (1, 60_000)), "too narrow"),
        (Image.new("RGB", (0, 5)), "is empty"),
        ("/dev/zero", "is a device; name one picture"),
        (5, "is not a picture"),
    ],
)
def test_what_is_no_usable_picture_gets_one_sentence(source, words):
    with pytest.raises(ModelError, match=words) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["file://{}/a%20b.png", "file://localhost{}/a b.png", "file:a%20b.png", "file://a b.png"],
)
def test_a_picture_may_be_named_by_a_file_url(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 2)).save("a b.png")
    assert open_image(name.format(tmp_path)).size == (3, 2)
    with pytest.raises(ModelError, match="picture file://{}/none.png does not exist"):
        open_image("file://{}/none.png")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ModelError, match="is a named pipe; name one"):
        open_image(tmp_path / "pipe.png")


def test_a_picture_that_needs_no_change_is_not_copied():
    image = picture()
    assert open_image(image) is image


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


def progressive(more_scans: int) -> bytes:
    """A progressive JPEG of a black picture, in which one scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    *before, last = file.getvalue().split(b"\xff\xda")
    scans = [*before, *[before[-1]] * more_scans, last]
    return b"\xff\xda".join(scans)


def test_a_jpeg_of_many_scans_is_not_decoded(tmp_path):
    """Each scan takes as long as the whole picture: 600 KB took minutes."""
    assert open_image(progressive(80)).size == (64, 64)
    (tmp_path / "a.jpg").write_bytes(progressive(3000))
    for source in (progressive(3000), tmp_path / "a.jpg"):
        with pytest.raises(ImageTooLarge, match=r"JPEG of 3,\d\d\d scans, the limit is 100"):
            open_image(source)
