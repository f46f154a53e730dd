"""Images to arrays: opened safely, RGB, upright, resized and cropped as the family's original does.

Takes a path, bytes or PIL image; returns float32 NHWC [1, S, S, 3] with raw values 0..255. Mean and
standard deviation are applied inside the vision encoder's graph, not here.
"""

import io
import math
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from models.errors import ModelError
from models.files import kind_of, open_regular

from .picture_files import FileBelow, path_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# the common ones of PIL's formats (JPEG opens MPO, too); none starts another program, as EPS would
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
FORMAT_NAMES = "PNG, JPEG, WebP, BMP, GIF or TIFF"
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 178,956,970: where PIL stops trusting a header
MAX_SIDE = 65_535  # the longest of a JPEG; PIL's resize takes 48 bytes for each pixel of it
MAX_RATIO = 2_000  # of the longer side to the shorter one
MAX_SCANS = 100  # of a JPEG; each goes through all pixels, and cameras and encoders write about 10
START_OF_SCAN = b"\xff\xda"  # nothing in a scan itself looks like it
MAX_RESIZED_PIXELS = 1 << 24  # 64 MB, of which the centre is cut out
BICUBIC = Image.Resampling.BICUBIC
WHOLE = 1e-3  # a denormalised value this close to a whole number was that number
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # its value -> what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE = 258  # TIFF tag
PHOTOMETRIC = 262  # TIFF tag
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC


class ImageTooLarge(ModelError):
    """An image with more pixels, longer sides or a larger ratio of its sides than is read."""


def open_image(source, upright: bool = True) -> Image.Image:
    """Path, file: URL, FileBelow, bytes or PIL image -> decoded RGB image of the same size.

    ModelError says in a sentence why it cannot be used. Every mode becomes RGB the way the
    originals do it, by PIL's `convert`: alpha is dropped (not blended), grey is repeated, palettes
    are looked up, the first frame of an animation counts. 16-bit grey is scaled to 8 bits.

    upright: apply the camera's EXIF rotation first, as transformers' image loader (LLaVA,
    GLM-Edge-V) does and as a person sees the image. The VisualGLM and GLM-4V demos ignore the tag:
    pass False for their exact pixels of a rotated photo.
    """
    name, image = open_header(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            image.load()
            depth = _grey_depth(image)
            if upright:
                image = _turned_upright(image)
    except Exception as error:  # PIL's decoders raise whatever their parsers stumble over
        raise ModelError(
            f"{name} is damaged or truncated ({_brief(error)}); use another copy of it"
        ) from None
    if depth:
        image = _to_8_bits(image, *depth)
    return _rgb(image, name)


def open_header(source, max_pixels: int = MAX_PIXELS) -> tuple[str, Image.Image]:
    """(name for messages, the image with its header read but nothing decoded)

    ImageTooLarge for its size, ModelError for what is no picture of `FORMATS`.
    """
    if isinstance(source, Image.Image):
        name = "the picture"
        image = source
    else:
        name = _name(source)
        image = _open(source, name, max_pixels)
    _check_size(name, *image.size, max_pixels)
    return name, image


def squash(image: Image.Image, width: int, height: int, resample: int = BICUBIC) -> Image.Image:
    """Resized to width x height whatever the aspect: VisualGLM, GLM-4V."""
    return image.resize((width, height), resample)


def shorter_edge_to(image: Image.Image, size: int, resample: int = BICUBIC) -> Image.Image:
    """Resized until the shorter edge is `size`, the other truncated to whole pixels: CLIP, LLaVA."""
    short = min(image.size)
    long = max(image.size)
    scaled = int(size * long / short)
    if size * scaled > MAX_RESIZED_PIXELS:
        raise ModelError(
            f"a picture of {image.width}x{image.height} is too narrow: its longer edge "
            f"would become {scaled:,} pixels (limit {MAX_RESIZED_PIXELS // size:,}); crop it first"
        )
    width = size if image.width <= image.height else scaled
    height = size + scaled - width
    return image.resize((width, height), resample)


def crop_center(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the image; what a smaller one lacks is black: CLIP, LLaVA."""
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square as long as its longer edge: LLaVA's authors' own way."""
    side = max(image.size)
    # a file of few bytes must not fill the memory: a narrow image gets a smaller square
    limit = min(MAX_PIXELS, max(MAX_RESIZED_PIXELS, 4 * image.width * image.height))
    if side * side > limit:
        raise ImageTooLarge(
            f"a picture of {image.width}x{image.height} becomes a square of {side * side:,} pixels, "
            f"the limit is {limit:,}; make it smaller first"
        )
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_pad(image: Image.Image, size: int, resample: int = BICUBIC) -> Image.Image:
    """Fit into size x size keeping the aspect (also enlarging), top left, rest zero: GLM-Edge-V."""
    across = size / image.width
    down = size / image.height
    if across < down:
        width = size
        height = math.floor(image.height * across) or 1
    else:
        width = math.floor(image.width * down) or 1
        height = size
    square = Image.new("RGB", (size, size))
    square.paste(image.resize((width, height), resample))
    return square


def as_array(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 [1, H, W, 3], raw 0..255."""
    return np.asarray(image, dtype=np.float32)[None]


def one_by_one(pixels) -> np.ndarray:
    """Arrays [..., 3, S, S] in a list, or one with more axes; None -> [n, 1, 3, S, S]"""
    try:
        images = np.asarray([] if pixels is None else pixels)
    except ValueError:  # pictures of different sizes
        images = np.empty(1, object)
    if images.size and (images.ndim < 3 or not np.issubdtype(images.dtype, np.number)):
        raise ModelError(
            f"pixels are {images.dtype} {list(images.shape)}; numbers [n, 3, S, S] are expected"
        )
    return images.reshape(-1, 1, *images.shape[-3:]) if images.size else images


def denormalize(pixels: np.ndarray, mean, std, shape: tuple[int, ...]) -> np.ndarray:
    """Undo (x / 255 - mean) / std: float NCHW -> float32 NHWC of `shape`, raw 0..255.

    Values that come from an 8-bit image become exactly its whole numbers again. ModelError for
    another shape or no floats.
    """
    batch, height, width, channels = shape
    is_float = np.issubdtype(pixels.dtype, np.floating)
    if pixels.shape != (batch, channels, height, width) or not is_float:
        raise ModelError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}, expected normalised float values "
            f"{[batch, channels, height, width]} as the release's preprocessor returns them"
        )
    raw = (pixels.astype(np.float64).transpose(0, 2, 3, 1) * std + mean) * 255
    whole = np.rint(raw)
    if np.abs(raw - whole).max() < WHOLE:
        raw = whole
    return raw.astype(np.float32)


def _name(source) -> str:
    if isinstance(source, bytes):
        return f"the picture ({len(source):,} bytes)"
    return f"picture {source}"


def _open(source, name: str, max_pixels: int) -> Image.Image:
    """Header read, nothing decoded."""
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else _open_file(source, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes and odd metadata
            image = Image.open(stream, formats=FORMATS)
        if image.format in ("JPEG", "MPO"):
            _check_scans(name, stream)
        return image
    except ModelError:
        raise
    except FileNotFoundError:
        raise ModelError(f"{name} does not exist; check --image") from None
    except PermissionError:
        raise ModelError(f"{name} may not be read; change its permissions") from None
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise _too_many(name, pixels, max_pixels) from None
    except Exception:  # not only UnidentifiedImageError: a damaged header raises all kinds
        raise ModelError(
            f"{name} is not a picture that can be read; use {FORMAT_NAMES} with 8 bits a channel"
        ) from None


def _open_file(path, name: str) -> BinaryIO:
    if isinstance(path, FileBelow):
        return path.open()
    if isinstance(path, str):
        path = path_of(path)
    kind = kind_of(Path(path).stat().st_mode)
    if kind:
        raise ModelError(f"{name} is {kind}; name one picture file")
    return open_regular(path)


def _check_scans(name: str, stream: BinaryIO):
    """ImageTooLarge for a JPEG of few bytes that takes minutes to decode."""
    place = stream.tell()
    stream.seek(0)
    scans = stream.read().count(START_OF_SCAN)
    stream.seek(place)
    if scans > MAX_SCANS:
        raise ImageTooLarge(
            f"{name} is a JPEG of {scans:,} scans, the limit is {MAX_SCANS}; save it anew first"
        )


def _check_size(name: str, width: int, height: int, max_pixels: int):
    short, long = sorted((width, height))
    if short < 1:
        raise ModelError(f"{name} is empty ({width} x {height} pixels); use another one")
    if long > MAX_SIDE:
        raise ImageTooLarge(
            f"{name} has {width} x {height} pixels, the limit is {MAX_SIDE:,} for a side; crop it "
            "or make it smaller first"
        )
    if width * height > max_pixels:
        raise _too_many(name, width * height, max_pixels)
    if long > MAX_RATIO * short:
        raise ImageTooLarge(
            f"{name} is too narrow with {width} x {height} pixels: the limit is {MAX_RATIO:,} "
            "times as long as wide; crop it first"
        )


def _too_many(name: str, pixels: int, limit: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"{name} has {pixels:,} pixels, the limit is {limit:,}; make it smaller first"
    )


def _turned_upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; the same object where there is nothing to turn, or where the
    EXIF block is damaged, which harms no pixel."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # whatever PIL's parser stumbles over
        return image
    method = TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def _grey_depth(image: Image.Image) -> tuple[int, bool] | None:
    """(largest value, is white zero) of grey with more than 8 bits; None for all other images."""
    if image.mode == "I" and image.format == "PNG":  # before Pillow 11
        return 65_535, False
    if not image.mode.startswith("I;16"):
        return None
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    return (1 << bits) - 1, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _to_8_bits(image: Image.Image, largest: int, white_is_zero: bool) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """ModelError for values whose range is not known: integers of 32 bits, floats."""
    if image.mode in ("I", "F"):
        raise ModelError(
            f"{name} has integers of 32 bits or floats, and nothing says which value is white; save "
            "it with 8 bits a channel first"
        )
    if image.mode == "RGB":
        return image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a palette's alpha is dropped on purpose
            return image.convert("RGB")
    except (ValueError, OSError):
        raise ModelError(
            f"{name} has colours of the kind {image.mode}, which cannot be shown as RGB; save it "
            "as an 8-bit PNG"
        ) from None


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
