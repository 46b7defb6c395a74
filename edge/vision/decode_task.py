"""What `edge.vision.decode` asks its children, and what they answer; neither loads Pillow."""

from __future__ import annotations

import msgspec

from .layout import Size
from .section import VisionSection


class Task(msgspec.Struct, array_like=True):
    """A picture to decode.

    Attributes:
        data: the encoded picture, or its pixels, RGB in rows, if ``raw`` is their size.
        format: Pillow's name of the encoding; no other decoder is tried.
        raw: width and height of pixels that need no decoder.
        section: of the bundle; None asks for the size only.
        tiles: see `plan_layout`.
        max_pixels: a picture with more is not decoded.
    """

    data: bytes
    format: str = ""
    raw: Size | None = None
    section: VisionSection | None = None
    tiles: int | None = None
    max_pixels: int = 0


class Decoded(msgspec.Struct, array_like=True):
    """What a picture is.

    Attributes:
        width, height: as it is shown, in pixels; 0 where the header is not understood.
        pixels: of each tile, RGB in rows; empty where they were not asked for.
        too_large: whether it has more than ``max_pixels``, and was not decoded.
        why: what a decoder found wrong; empty if nothing.
    """

    width: int = 0
    height: int = 0
    pixels: bytes = b""
    too_large: bool = False
    why: str = ""
