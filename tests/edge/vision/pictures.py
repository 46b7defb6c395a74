"""Pictures of every kind that people send, drawn alike on every machine, and bundles' sections."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.edge.vision.test_section import WRITTEN

GOLDEN_PATH = Path(__file__).parents[2] / "data" / "golden" / "pictures.json"
"""What transformers makes of `LOSSLESS` for `SECTIONS`; `tools.goldens.references` writes it."""
TINY_SMOLVLM = WRITTEN
SMOLVLM = msgspec.structs.replace(TINY_SMOLVLM, tile_px=512, rows_per_tile=64, longest_edge_px=2048)
"""SmolVLM-256M-Instruct and SmolVLM2-500M-Video-Instruct, by their ``preprocessor_config.json``."""
INTERNVL = msgspec.structs.replace(
    SMOLVLM,
    family="internvl",
    tile_px=448,
    rows_per_tile=256,
    longest_edge_px=448,
    max_tiles=13,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resample=3,
    image_token="<IMG_CONTEXT>",
    begin_token="<img>",
    end_token="</img>",
    whole_token="",
    tile_token="",
)
"""InternVL3-1B-hf, by its ``preprocessor_config.json``."""
TINY_INTERNVL = msgspec.structs.replace(INTERNVL, tile_px=28, rows_per_tile=1)
SECTIONS = {
    "smolvlm": SMOLVLM,
    "tiny-smolvlm": TINY_SMOLVLM,
    "internvl": INTERNVL,
    "tiny-internvl": TINY_INTERNVL,
}
LIMITS = (None, 0, 1, 2, 4, 7)
SIZES = [
    *((640, 480), (1920, 1080), (1080, 1920), (4032, 3024), (1, 1), (10_000, 10_000), (10_000, 1)),
    *((1, 10_000), (512, 512), (513, 512), (448, 896), (896, 448), (2048, 1536), (100, 99)),
    *((2047, 683), (683, 2049), (3000, 1001), (1001, 3000), (333, 1000), (16, 9), (2, 3)),
]


def digest(values: NDArray[np.float32]) -> str:
    assert values.dtype == np.float32
    return hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()[:16]


def drawn(width: int, height: int, channels: int = 3) -> NDArray[np.uint8]:
    """Shapes with edges, ramps and fine grain ``[height, width, channels]``, of integers only."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    parts = []
    for channel in range(channels):
        ramp = x * (3 + channel) // 4 + y * (5 - channel) // 3
        grain = (x * 7919 + y * 104729 + channel * 31) * 2654435761 >> 13 & 31
        edge = ((x // 11 + y // 7 + channel) % 3) * 60
        parts.append((ramp + grain + edge) & 255)
    return np.stack(parts, axis=-1).astype(np.uint8)


def encode(image: Image.Image, name: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    if mode == "RGB":
        return Image.fromarray(drawn(width, height))
    if mode in ("P", "1"):
        return Image.fromarray(drawn(width, height)).convert(mode)
    channels = drawn(width, height, len(Image.new(mode, (1, 1)).getbands()))
    return Image.fromarray(channels[..., 0] if mode == "L" else channels, mode=None).convert(mode)


def with_alpha(width: int, height: int, mode: str) -> Image.Image:
    """A picture that is clear, half clear and solid in places."""
    image = picture(width, height)
    alpha = Image.fromarray(drawn(width, height, 1)[..., 0])
    if mode == "LA":
        return Image.merge("LA", (image.convert("L"), alpha))
    image.putalpha(alpha)
    return image


def turned(name: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(93, 41), name, exif=exif.tobytes(), **options)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG by its parts, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 9))
    chunks = (chunk(b"IHDR", header), *more, pixels, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey16(width: int, height: int) -> tuple[bytes, NDArray[np.uint16]]:
    """A PNG of 16-bit grey, and its values."""
    low, high = drawn(width, height, 2)[..., 0], drawn(width, height, 2)[..., 1]
    values = (high.astype(np.uint16) << 8 | low).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, 0, rows), values


def _rgb16() -> bytes:
    values = drawn(37, 21, 6).reshape(21, -1)
    return png(37, 21, 16, 2, b"".join(b"\0" + row.tobytes() for row in values))


def _palette_with_clear_colours() -> bytes:
    image = picture(70, 50, "P")
    return encode(image, transparency=bytes(range(0, 256, 2)))


def _animation(name: str, **options: Any) -> bytes:
    frames = [picture(60, 40), Image.new("RGB", (60, 40)), Image.new("RGB", (60, 40), 255)]
    return encode(frames[0], name, save_all=True, append_images=frames[1:], **options)


LOSSLESS: dict[str, Callable[[], bytes]] = {
    "photo": lambda: encode(picture(640, 480)),
    "wide": lambda: encode(picture(1500, 90)),
    "tall": lambda: encode(picture(33, 1001)),
    "one pixel": lambda: encode(picture(1, 1)),
    "two pixels": lambda: encode(picture(1, 2)),
    "a line": lambda: encode(picture(10_000, 1)),
    "a column": lambda: encode(picture(3, 9_999)),
    "just a tile": lambda: encode(picture(512, 512)),
    "odd": lambda: encode(picture(511, 513)),
    "large": lambda: encode(picture(2100, 1402)),
    "grey": lambda: encode(picture(80, 50, "L")),
    "grey with alpha": lambda: encode(with_alpha(80, 50, "LA")),
    "alpha": lambda: encode(with_alpha(80, 61, "RGBA")),
    "palette": lambda: encode(picture(80, 50, "P")),
    "palette with alpha": _palette_with_clear_colours,
    "a clear colour": lambda: encode(picture(50, 50), transparency=(0, 96, 143)),
    "a clear grey": lambda: encode(picture(50, 50, "L"), transparency=100),
    "one bit": lambda: encode(picture(70, 33, "1")),
    "16 bits": _rgb16,
    "animated png": lambda: _animation("PNG"),
    "gif": lambda: encode(picture(60, 40), "GIF"),
    "animated gif": lambda: _animation("GIF"),
    "clear gif": lambda: encode(picture(60, 40, "P"), "GIF", transparency=3),
    "bmp": lambda: encode(picture(61, 41), "BMP"),
    "grey bmp": lambda: encode(picture(61, 41, "L"), "BMP"),
    "webp": lambda: encode(picture(61, 41), "WEBP", lossless=True),
    "alpha webp": lambda: encode(with_alpha(61, 41, "RGBA"), "WEBP", lossless=True, exact=True),
    "animated webp": lambda: _animation("WEBP", lossless=True),
    **{f"turned {i}": partial(turned, "PNG", i) for i in range(1, 9)},
}
"""What a picture is when it is decoded does not depend on a library's version."""
LOSSY: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(picture(300, 200), "JPEG"),
    "progressive": lambda: encode(picture(300, 200), "JPEG", progressive=True, subsampling=0),
    "grey jpeg": lambda: encode(picture(300, 200, "L"), "JPEG"),
    "cmyk": lambda: encode(picture(300, 200, "CMYK"), "JPEG"),
    "turned jpeg": lambda: turned("JPEG", 6),
    "several pictures": lambda: encode(
        picture(90, 60), "MPO", save_all=True, append_images=[picture(30, 20)]
    ),
    "lossy webp": lambda: encode(picture(700, 600), "WEBP"),
    "turned webp": lambda: turned("WEBP", 8),
}
