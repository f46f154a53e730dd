"""Pictures of requests: as clients encode them, below the allowed folder, and nothing else."""

import base64
import io
import os
import time

import pytest
from http_service import png
from PIL import Image

from models.prompt import picture_files
from runtime.serve.errors import ApiError
from runtime.serve.images import ImageRules

DATA = png(30, 20) + bytes(1)
BASE64 = base64.b64encode(DATA).decode()


def rules(folder=None, pixels=1_000_000):
    return ImageRules(4, 200_000, pixels, folder)


def refusal(url, folder=None):
    with pytest.raises(ApiError) as error:
        rules(folder).from_url(url)
    assert error.value.status in (400, 413, 422)
    return str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + BASE64,
        "data:image/png;base64," + base64.encodebytes(DATA).decode(),
        "data:image/png;base64," + BASE64 + "\r\n",
        "data:image/png;base64, " + BASE64,
        "data:image/png;base64,\t" + "\t".join(BASE64),
        " data:image/png;base64," + BASE64,
        "data:image/png;base64," + BASE64.rstrip("="),
        "data:image/png;base64," + BASE64.rstrip("=") + "====",
        "data:image/png;base64," + base64.urlsafe_b64encode(DATA).decode(),
        "data:image/png;base64," + BASE64.replace("+", "%2B").replace("=", "%3D"),
        "data:application/octet-stream;base64," + BASE64,
        "data:image/jpeg;base64," + BASE64,
        "data:;base64," + BASE64,
        "data:base64;base64," + BASE64,
        "data:base64," + BASE64,
        "data:image;base64," + BASE64,
        'data:image/png;name="a,b.png";base64,' + BASE64,
        "data:image/png," + BASE64,  # base64, though it does not say so
        "image/png;base64," + BASE64,
        "base64," + BASE64,
        f'"data:image/png;base64,{BASE64}"',
        f"<data:image/png;base64,{BASE64}>",
        "\ufeffdata:image/png;base64," + BASE64,
        "data:image/png;charset=utf-8;name=a.png;base64," + BASE64,
        "DATA:IMAGE/PNG;BASE64," + BASE64,
        "data:image/png; base64 ," + BASE64,
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
        BASE64,
        base64.encodebytes(DATA).decode(),
    ],
)
def test_as_clients_encode_them(url):
    image = rules().from_url(url)
    assert image.size == (30, 20) and image.getpixel((0, 0)) == (200, 30, 60)


def test_the_url_safe_alphabet():
    data = png(30, 20) + b"\xfb\xff\xfe"
    encoded = base64.urlsafe_b64encode(data).decode()
    assert set("-_") & set(encoded)
    assert rules().from_url("data:;base64," + encoded).size == (30, 20)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_without_a_prefix(kind, encode):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 30, 60)).save(file, kind)
    assert rules().from_url(encode(file.getvalue()).decode()).size == (30, 20)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,iVBO@@@", "not valid base64: character 5 is '@'"),
        ("data:image/png;base64,iVBOR", "not valid base64: its 5 characters"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "no data behind its comma"),
        ("data:image/png;base64,SGVsbG8=", "not a picture that can be read; use PNG, JPEG"),
        ("data:image/svg+xml,%3Csvg%3E", "not a picture that can be read"),
        ("data:image/png,\ud83d", "not a picture that can be read"),
        ("data:image/png;base64,\ud83d", "not valid base64"),
        ("blob:http://localhost/1", "begins with blob:"),
        ("img.png", "--allowed-local-media-path DIR"),
        ("", "image_url is empty"),
    ],
)
def test_the_sentence_names_the_true_reason(url, words):
    found = refusal(url)
    assert words in found and "must be a data URI" not in found


@pytest.fixture
def folder(tmp_path):
    allowed = tmp_path / "allowed"
    (allowed / "more").mkdir(parents=True)
    (allowed / "img.png").write_bytes(DATA)
    (allowed / "more" / "a b#1.png").write_bytes(DATA)
    (allowed / "inner.png").symlink_to(allowed / "more" / "a b#1.png")
    (tmp_path / "secret.png").write_bytes(DATA)
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    (allowed / "up").symlink_to(tmp_path)
    os.mkfifo(allowed / "pipe.png")
    return allowed


@pytest.mark.parametrize(
    "url",
    [
        "img.png",
        "./img.png",
        "more/a b#1.png",
        "more/../img.png",
        "inner.png",
        "{folder}/img.png",
        "file://{folder}/img.png",
        "file://localhost{folder}/more/a%20b%231.png",
        "file://img.png",
        "FILE:more/a%20b%231.png",
    ],
)
def test_a_file_below_the_folder(url, folder):
    assert rules(folder).from_url(url.format(folder=folder)).size == (30, 20)


@pytest.mark.parametrize(
    "url",
    [
        "../secret.png",
        "link.png",
        "up/secret.png",
        "{folder}/../secret.png",
        "file://{folder}/link.png",
        "file://elsewhere{folder}/img.png",
        "file:../secret.png",
        "file://[x/img.png",
        "missing.png",
        "more",
        "pipe.png",
        "/dev/zero",
        "a\0b",
        "x" * 5000,
    ],
)
def test_no_other_file(url, folder):
    begun = time.monotonic()
    found = refusal(url.format(folder=folder), folder)
    assert "may read; name a picture below the folder" in found and "img.png" in found
    assert time.monotonic() - begun < 5


def test_without_a_folder_the_flag_is_named(folder):
    assert "--allowed-local-media-path DIR" in refusal(f"file://{folder}/img.png")


@pytest.mark.parametrize("place", ["img.png", "more/a b#1.png"])
def test_a_link_put_in_its_place_after_the_check_is_not_followed(place, folder, monkeypatch):
    target = folder / place
    secret = folder.parent / "secret.png"

    def swap_then_open(*arguments, **more):
        monkeypatch.undo()
        replaced = target if target.parent == folder else target.parent
        replaced.rename(folder / "away")
        replaced.symlink_to(secret if replaced == target else folder.parent)
        return os.open(*arguments, **more)

    (folder.parent / "a b#1.png").write_bytes(DATA)
    monkeypatch.setattr(picture_files.os, "open", swap_then_open)
    assert "may read" in refusal(place, folder)


def test_the_size_is_checked_before_decoding():
    wide = png(1200, 900)
    with pytest.raises(ApiError, match="1,080,000 pixels, the limit is 1,000,000") as error:
        rules().decode(wide)
    assert error.value.status == 413
