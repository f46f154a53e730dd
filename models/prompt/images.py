"""Images to arrays: open safely, bring to RGB upright, resize and crop as each family's original
does.

Takes a path, bytes or PIL image; returns float32 NHWC [1, S, S, 3] with raw values 0..255. Mean and
standard deviation are applied inside the vision encoder's graph, not here.
"""

import io
import math
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from models.errors import ModelError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 178,956,970: where PIL stops trusting a header
WHOLE = 1e-3  # a denormalised value this close to a whole number was that number


def open_image(source, upright: bool = True) -> Image.Image:
    """Path, bytes or PIL image -> decoded RGB image of the same size.

    ModelError says in a sentence why it cannot be used. Every mode becomes RGB the way the
    originals do it, by PIL's `convert`: alpha is dropped (not blended), grey is repeated, palettes
    are looked up, the first frame of an animation counts.

    upright: apply the camera's EXIF rotation first, as transformers' image loader (LLaVA,
    GLM-Edge-V) does and as a person sees the image. The VisualGLM and GLM-4V demos ignore the tag:
    pass False for their exact pixels of a rotated photo.
    """
    name, image = _open(source)
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        return _rgb(image)
    except Exception as error:  # PIL's decoders raise whatever their parsers stumble over
        raise ModelError(
            f"{name} is damaged or truncated ({_brief(error)}); use another copy of it"
        ) from None


def squash(image: Image.Image, size: int) -> np.ndarray:
    """Resize to size x size whatever the aspect: VisualGLM, GLM-4V."""
    return _array(image.resize((size, size), Image.Resampling.BICUBIC))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Shorter edge to `size` (the other one truncated to whole pixels), then the centre: CLIP,
    LLaVA.
    """
    short = min(image.size)
    long = max(image.size)
    scaled = int(size * long / short)
    if size * scaled > MAX_PIXELS:
        raise ModelError(
            f"a picture of {image.width}x{image.height} is too narrow: its longer edge would become "
            f"{scaled:,} pixels (limit {MAX_PIXELS // size:,}); crop it first"
        )
    width = size if image.width <= image.height else scaled
    height = size + scaled - width
    left = (width - size) // 2
    top = (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return _array(resized.crop((left, top, left + size, top + size)))


def fit_pad(image: Image.Image, size: int) -> np.ndarray:
    """Fit into size x size keeping the aspect (enlarging too), top left, the rest zero: GLM-Edge-V."""
    across = size / image.width
    down = size / image.height
    if across < down:
        width = size
        height = math.floor(image.height * across) or 1
    else:
        width = math.floor(image.width * down) or 1
        height = size
    pixels = np.zeros((1, size, size, 3), np.float32)
    pixels[:, :height, :width] = _array(image.resize((width, height), Image.Resampling.BICUBIC))
    return pixels


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


def _open(source) -> tuple[str, Image.Image]:
    """Name for messages, and the image with its header read but nothing decoded."""
    if isinstance(source, Image.Image):
        return "the picture", source
    if isinstance(source, bytes):
        name = f"the picture ({len(source):,} bytes)"
        file = io.BytesIO(source)
    else:
        name = f"picture {source}"
        file = Path(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return name, Image.open(file)
    except FileNotFoundError:
        raise ModelError(f"{name} does not exist; check --image") from None
    except IsADirectoryError:
        raise ModelError(f"{name} is a directory; name one picture in it") from None
    except PermissionError:
        raise ModelError(f"{name} may not be read; change its permissions") from None
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise ModelError(
            f"{name} has {pixels:,} pixels, the limit is {MAX_PIXELS:,}; make it smaller first"
        ) from None
    except Exception:  # not only UnidentifiedImageError: a damaged header raises all kinds
        raise ModelError(
            f"{name} is not a picture that can be read; use PNG, JPEG, WebP, BMP or GIF"
        ) from None


def _rgb(image: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        # "palette images with transparency": dropped on purpose
        warnings.simplefilter("ignore", UserWarning)
        return image.convert("RGB")


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)[None]


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
