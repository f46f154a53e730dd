"""Images of a request, from a data URI, base64, a file, or a host that the operator allows.

Takes a URL or encoded text, returns a decoded PIL image; the limits are checked before decoding.
"""

import base64
import binascii
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from .errors import ApiError
from .fetch import fetch

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True)
class ImageRules:
    """What the operator allows.

    max_images: of one request. max_bytes: of one file. max_pixels: of one image. folder: that files
    may be read from, or None. domains: that images may be fetched from, as `fetch` takes them.
    """

    max_images: int
    max_bytes: int
    max_pixels: int
    folder: Path | None = None
    domains: tuple[str, ...] = ()

    def from_url(self, url: str) -> Image.Image:
        """The image of a data: URI, a file: URL below the allowed folder, or a URL of an allowed
        domain. ApiError for anything else."""
        start = DATA_URI.match(url)
        if start:
            return self.from_base64(url[start.end() :])
        if url.startswith("file://"):
            return self.decode(self._read(url))
        if self.domains and url.startswith(("http://", "https://")):
            return self.decode(fetch(url, self.domains, self.max_bytes))
        raise ApiError(
            "image_url must be a data URI (data:image/png;base64,...); this server fetches no URL "
            "and reads no file that its operator did not allow",
            param="messages",
        )

    def from_base64(self, text: str) -> Image.Image:
        self._check_size(len(text) * 3 // 4)
        try:
            return self.decode(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise ApiError("the picture is not valid base64", 422, param="messages") from None

    def decode(self, data: bytes) -> Image.Image:
        """The header is read first, and nothing else of an image that is too large."""
        self._check_size(len(data))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels = image.width * image.height
        except Image.DecompressionBombError:
            pixels = 2 * Image.MAX_IMAGE_PIXELS
        except Exception:  # damaged headers raise all kinds
            raise ApiError(
                f"the picture cannot be read; use {', '.join(FORMATS)}", 422, param="messages"
            ) from None
        if pixels > self.max_pixels:
            raise ApiError(
                f"the picture has {pixels:,} pixels, the limit is {self.max_pixels:,}; make it "
                "smaller",
                413,
                param="messages",
            )
        return load(image)

    def _check_size(self, size: int):
        if size > self.max_bytes:
            raise ApiError(
                f"the picture has {size:,} bytes, the limit is {self.max_bytes:,}",
                413,
                param="messages",
            )

    def _read(self, url: str) -> bytes:
        """The file, up to max_bytes + 1 bytes. Links are followed before the folder is checked; a
        file outside gives the same error as one that is not there."""
        refused = ApiError("this file is not one that this server may read", param="messages")
        if self.folder is None:
            raise refused
        try:
            path = Path(unquote(urlsplit(url).path)).resolve(strict=True)
            if not (path.is_relative_to(self.folder.resolve()) and path.is_file()):
                raise refused
            with path.open("rb") as file:
                return file.read(self.max_bytes + 1)
        except (OSError, ValueError):
            raise refused from None


def load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception:  # PIL's decoders raise whatever their parsers stumble over
        raise ApiError("the picture is damaged or truncated", 422, param="messages") from None
    return image
