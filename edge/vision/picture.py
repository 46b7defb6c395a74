"""Accepts pictures as callers give them: encoded bytes, a path, an array or a PIL image."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edge.errors import RequestError
from edge.files import read_file

MAX_BYTES = 64 << 20
"""Limits an encoded picture; a PNG of a 20-megapixel photograph has about 40 MB."""
MAX_PIXELS = 100_000_000
"""Limits the pixels of a picture: 10,000 x 10,000."""
_FORMATS = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
}
_OTHERS = {
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"II*\x00": "a TIFF",
    b"MM\x00*": "a TIFF",
    b"<": "a text like SVG, XML or HTML",
    b"\xef\xbb\xbf<": "a text like SVG, XML or HTML",
}


@dataclass(frozen=True)
class Picture:
    """A picture, not decoded yet.

    Attributes:
        data: the encoded picture, or its pixels: uint8, RGB in rows.
        format: Pillow's name of the encoding; empty for pixels.
        size: width and height, of pixels only.
    """

    data: bytes
    format: str = ""
    size: tuple[int, int] | None = None

    @cached_property
    def sha256(self) -> str:
        """Return a hash of the data as given; one picture in two encodings has two hashes."""
        return hashlib.sha256(f"{self.format} {self.size} ".encode() + self.data).hexdigest()


def as_picture(value: object) -> Picture:
    """Check and wrap the picture of a message; only a PIL image is decoded.

    Args:
        value: bytes of a PNG, JPEG, WebP, GIF or BMP; a path of such a file; a uint8 array
            ``[height, width, 3]``, RGB; or a PIL image.

    Raises:
        RequestError: the value is none of these, too large, or a file that cannot be read.
    """
    match value:
        case Picture():
            return value
        case bytes() | bytearray() | memoryview():
            return _encoded(bytes(value))
        case str() | os.PathLike():
            return _file(Path(value))
        case np.ndarray():
            return _array(value)
        case _:
            pass  # PIL is not imported to be asked
    if any(base.__module__ == "PIL.Image" for base in type(value).__mro__):
        return _pil_image(value)
    raise RequestError(
        f"a picture is {type(value).__name__}; give the bytes of a PNG, JPEG, WebP, GIF or BMP, a "
        "path, a uint8 array [height, width, 3], or a PIL image"
    )


def too_large(width: int, height: int) -> RequestError:
    """Return the error for a picture of more than `MAX_PIXELS`."""
    return RequestError(
        f"a picture has {width:,} x {height:,} pixels; at most {MAX_PIXELS // 1_000_000} million "
        "are taken; make it smaller"
    )


def _encoded(data: bytes) -> Picture:
    if not data:
        raise RequestError("a picture has no bytes; send a PNG, JPEG, WebP, GIF or BMP")
    if len(data) > MAX_BYTES:
        raise RequestError(
            f"a picture has {len(data):,} bytes; at most {MAX_BYTES:,} are taken; make it smaller"
        )
    for name, marks in _FORMATS.items():
        if data.startswith(marks):
            return Picture(data, name)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Picture(data, "WEBP")
    if data[4:8] == b"ftyp":
        found = "a HEIC, AVIF or video"
    else:
        begin = data[:64].lstrip()
        found = next((name for mark, name in _OTHERS.items() if begin.startswith(mark)), "")
    raise RequestError(
        f"a picture is {found or 'in no known format'}, it begins with {data[:8]!r}; send a PNG, "
        "JPEG, WebP, GIF or BMP"
    )


def _file(path: Path) -> Picture:
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise RequestError(
            f"the picture {path} cannot be read: {error.strerror}; give the path of a file"
        ) from error
    try:
        return _encoded(data)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _array(array: np.ndarray) -> Picture:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise RequestError(
            f"a picture is an array of {array.dtype} {list(array.shape)}; give a uint8 array "
            "[height, width, 3], RGB"
        )
    height, width, _ = array.shape
    if width * height > MAX_PIXELS:
        raise too_large(width, height)
    return Picture(array.tobytes(), size=(width, height))


def _pil_image(image: object) -> Picture:
    from PIL import Image  # loaded already, since the caller has a PIL image

    from .decode_child import upright_rgb

    assert isinstance(image, Image.Image)
    if image.width * image.height > MAX_PIXELS:
        raise too_large(*image.size)
    try:
        image = upright_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"a PIL image cannot be read: {error}; give another") from error
    return Picture(image.tobytes(), size=image.size)
