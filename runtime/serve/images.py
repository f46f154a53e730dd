"""Images of a request, from a data URI, base64, a file, or a host that the operator allows.

Takes a URL or encoded text, returns a decoded PIL image; the limits are checked before decoding.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from models.errors import ModelError
from models.prompt.images import ImageTooLarge, open_header
from models.prompt.picture_files import read_below

from .errors import ApiError
from .fetch import fetch

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)  # C: is a disk
# the head of a data URI in base64; a client may have lost the beginning of it
IN_BASE64 = re.compile(
    r"(data:.{0,300}?(?<=[;:\s])|[\w/;+.-]{0,100}?)base64\s*,", re.IGNORECASE | re.DOTALL
)
# how a picture's first bytes look in base64: PNG, JPEG, GIF, WebP, BMP, TIFF
ENCODED_PICTURE = re.compile(
    r"\s*(iVBORw0KGgo|[/_]9j[/_]|R0lGOD|UklGR|Qk|SUkqA|TU0AKg)[\w+/=\s-]{40,}"
)
AROUND = " \t\r\n\ufeff\"'<>"  # what copied URLs have at their ends
NO_BASE64 = re.compile("[^A-Za-z0-9+/]")
URL_SAFE = str.maketrans("-_", "+/")
FORMS = "send a data URI (data:image/png;base64,...)"


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
        """The image of a data URI, of base64 without a prefix, of a file: URL or plain path below
        the allowed folder, or of a URL of an allowed domain. ApiError for anything else."""
        return self.decode(self._bytes_of(url.strip(AROUND)))

    def decode(self, data: bytes) -> Image.Image:
        """The header is read first, and nothing else of an image that is too large."""
        self._check_size(len(data))
        try:
            _, image = open_header(data, self.max_pixels)
        except ImageTooLarge as error:
            raise ApiError(str(error), 413) from None
        except ModelError as error:
            raise ApiError(str(error), 422) from None
        return load(image)

    def _bytes_of(self, url: str) -> bytes:
        head = IN_BASE64.match(url)
        if head:
            return self._from_base64(unquote(url[head.end() :]))
        scheme = SCHEME.match(url)
        kind = scheme[1].lower() if scheme else ""
        if kind == "data":
            return self._from_plain_data(url)
        if kind in ("http", "https"):
            return self._fetched(url)
        if kind and kind != "file":
            raise _refused(f"image_url begins with {kind[:20]}:, which is not supported; {FORMS}")
        if not url:
            raise _refused(f"image_url is empty; {FORMS}")
        if ENCODED_PICTURE.fullmatch(url):
            return self._from_base64(url)
        return self._read(url)

    def _from_plain_data(self, url: str) -> bytes:
        """Of a data URI that does not say base64, though its data may be."""
        _, comma, data = url.partition(",")
        if not comma:
            raise _refused(
                "the data URI has no comma in front of its data; write data:image/png;base64,..."
            )
        if ENCODED_PICTURE.fullmatch(data):
            return self._from_base64(data)
        return unquote_to_bytes(data.encode(errors="replace"))

    def _from_base64(self, text: str) -> bytes:
        """Of either alphabet, with white space, with or without padding."""
        text = "".join(text.split()).translate(URL_SAFE).rstrip("=")
        self._check_size(len(text) * 3 // 4)
        if not text:
            raise _refused("the data URI has no data behind its comma", 422)
        wrong = NO_BASE64.search(text)
        if wrong:
            reason = f"character {wrong.start() + 1} is {wrong[0]!r}"
            raise _refused(f"the picture is not valid base64: {reason}", 422)
        if len(text) % 4 == 1:
            reason = f"its {len(text)} characters are one too few or too many"
            raise _refused(f"the picture is not valid base64: {reason}", 422)
        return base64.b64decode(text + "=" * (-len(text) % 4))

    def _fetched(self, url: str) -> bytes:
        if not self.domains:
            raise _refused(
                f"this server fetches no URL; {FORMS}, or let its operator name the host with "
                "--allowed-media-domains"
            )
        return fetch(url, self.domains, self.max_bytes)

    def _read(self, path: str) -> bytes:
        """The file, up to max_bytes + 1 bytes. One outside the folder gives the same error as one
        that is not there."""
        if self.folder is None:
            raise _refused(
                f"a file is not one that this server may read, and image_url is none of the other "
                f"forms; {FORMS}, or let its operator start it with --allowed-local-media-path DIR"
            )
        try:
            return read_below(path, self.folder, self.max_bytes)
        except (OSError, ValueError, RuntimeError, ModelError):
            raise _refused(
                "this file is not one that this server may read; name a picture below the folder "
                f"of --allowed-local-media-path, as img.png or file:///folder/img.png, or {FORMS}"
            ) from None

    def _check_size(self, size: int):
        if size > self.max_bytes:
            raise ApiError(
                f"the picture has {size:,} bytes, the limit is {self.max_bytes:,}",
                413,
            )


def load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception:  # PIL's decoders raise whatever their parsers stumble over
        raise ApiError("the picture is damaged or truncated", 422) from None
    return image


def _refused(message: str, status: int = 400) -> ApiError:
    return ApiError(message, status)
