"""Defines the messages between `edge.vision.decode` and its children; neither side loads Pillow."""

from __future__ import annotations

import msgspec

from .layout import Size
from .section import VisionSection


class Task(msgspec.Struct, array_like=True):
    """A picture to decode.

    Attributes:
        data: the encoded picture; if ``raw`` is set, its pixels, RGB in rows.
        format: Pillow's name of the encoding; no other decoder is tried.
        raw: width and height of pixels that need no decoder.
        section: the bundle's section ``vision``; None asks for the size only.
        tiles: limit on the number of tiles, as `plan_layout` takes it.
        max_pixels: a picture with more pixels is not decoded.
    """

    data: bytes
    format: str = ""
    raw: Size | None = None
    section: VisionSection | None = None
    tiles: int | None = None
    max_pixels: int = 0


class Decoded(msgspec.Struct, array_like=True):
    """The answer to a `Task`.

    Attributes:
        width, height: the picture's size as it is shown, in pixels; 0 if the header is invalid.
        pixels: pixels of each tile, RGB in rows; empty if only the size was asked for.
        too_large: whether the picture has more than ``max_pixels`` and was not decoded.
        why: the decoder's complaint; empty if there is none.
    """

    width: int = 0
    height: int = 0
    pixels: bytes = b""
    too_large: bool = False
    why: str = ""
