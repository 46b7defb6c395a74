"""Decodes untrusted pictures into tiles; Pillow runs only in confined children.

A picture of up to `USUAL_PIXELS` goes to one child that keeps running, so it costs little more than
its decoding. A larger one gets a child of its own with more time and memory, one at a time, so the
usual ones never wait for it. Both are niced, so that generation goes first.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge.errors import DependencyError, RequestError, install_command
from edge.limited_child import ChildError, LimitedChild, LimitError, Limits

from .decode_task import Decoded, Task
from .layout import Layout, plan_layout
from .picture import MAX_PIXELS, Picture, as_picture, too_large

if TYPE_CHECKING:
    from .section import VisionSection

USUAL_PIXELS = 16_000_000
"""Limits the pixels of a picture that the child for usual pictures decodes."""
USUAL_LIMITS = Limits(cpu_s=5.0, memory_bytes=768 << 20, nice=5, tasks=20, confined=True)
"""Limits that child; a photograph of 12 million pixels takes 0.2 s and 200 MB."""
LARGE_LIMITS = Limits(cpu_s=20.0, memory_bytes=1536 << 20, nice=10, tasks=1, confined=True)
"""Limits the child of a larger picture; a JPEG of 10,000 x 10,000 takes 2 s and 1 GB."""
MIN_PILLOW = (13, 0) if sys.version_info >= (3, 11) else (12, 3)
"""Equals the bound in the extra ``images``: the newest Pillow for each Python."""
_FUNCTION = "edge.vision.decode_child:work"
_usual = LimitedChild(_FUNCTION, USUAL_LIMITS)
_large = threading.Lock()


@dataclass(frozen=True)
class Tiles:
    """A decoded picture.

    Attributes:
        pixels: uint8 ``[tiles, tile_px, tile_px, 3]``, RGB; the last tile shows the whole picture.
        layout: how the picture was cut.
        width, height: the picture's size as it is shown, in pixels.
        section: the section of the bundle for which it was cut.
    """

    pixels: np.ndarray
    layout: Layout
    width: int
    height: int
    section: VisionSection

    def normalised(self, which: slice = slice(None)) -> np.ndarray:
        """Return tiles as the encoder takes them: float32 ``[tiles, 3, tile_px, tile_px]``.

        Args:
            which: the tiles to return; a tile of 512 x 512 pixels takes 3 MB.
        """
        pixels = self.pixels[which]
        values = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
        for channel, table in enumerate(_normalised_bytes(self.section)):
            np.take(table, pixels[..., channel], out=values[:, channel])
        return values


def decode_picture(
    picture: Picture | bytes, section: VisionSection, *, tiles: int | None = None
) -> Tiles:
    """Decode a picture, and cut it into tiles.

    Args:
        picture: a picture, or the bytes of one, as `as_picture` takes them.
        section: the bundle's section ``vision``.
        tiles: limit on the number of tiles, as `plan_layout` takes it.

    Raises:
        RequestError: the format is unknown, or the picture is damaged, too large or too slow.
        DependencyError: Pillow is missing or too old.
        ResourceError: `LimitedChild.ask` failed, e.g. because this kernel confines no process.
    """
    picture = as_picture(picture)
    answer = _ask(picture, section, tiles)
    layout = plan_layout(answer.width, answer.height, section, tiles)
    shape = (layout.tiles, section.tile_px, section.tile_px, 3)
    pixels = np.frombuffer(answer.pixels, np.uint8)
    if pixels.size != np.prod(shape):
        raise _damaged(picture, "its decoder gave no whole tiles")
    return Tiles(pixels.reshape(shape), layout, answer.width, answer.height, section)


def picture_size(picture: Picture | bytes) -> tuple[int, int]:
    """Return a picture's width and height as it is shown, in pixels, from its header.

    Raises:
        RequestError: `decode_picture` would refuse the picture for its header.
        DependencyError: Pillow is missing or too old.
        ResourceError: `LimitedChild.ask` failed.
    """
    picture = as_picture(picture)
    if picture.size is not None:
        return picture.size
    answer = _ask(picture, None, None)
    return answer.width, answer.height


def _ask(picture: Picture, section: VisionSection | None, tiles: int | None) -> Decoded:
    _require_pillow()
    task = Task(picture.data, picture.format, picture.size, section, tiles)
    width, height = picture.size or (0, 0)
    if width * height <= USUAL_PIXELS:
        answer = _ask_child(_usual, USUAL_LIMITS, USUAL_PIXELS, picture, task)
        width, height = answer.width, answer.height
        if width * height > MAX_PIXELS:
            raise too_large(width, height)
        if not answer.too_large:
            return answer
    with _large, LimitedChild(_FUNCTION, LARGE_LIMITS) as child:
        return _ask_child(child, LARGE_LIMITS, MAX_PIXELS, picture, task)


def _ask_child(
    child: LimitedChild, limits: Limits, max_pixels: int, picture: Picture, task: Task
) -> Decoded:
    task.max_pixels = max_pixels
    try:
        data = child.ask(msgspec.msgpack.encode(task))
        answer = msgspec.msgpack.decode(data, type=Decoded)
    except LimitError:
        raise RequestError(
            f"{_name(picture)} takes more than {limits} to decode; make it smaller, or save it "
            "anew as a PNG or JPEG"
        ) from None
    except (ChildError, msgspec.DecodeError) as error:
        raise _damaged(picture, f"its decoder failed: {error}") from error
    if answer.why:
        raise _damaged(picture, answer.why, answer)
    if min(answer.width, answer.height) < 1:
        raise _damaged(picture, "it has no pixels", answer)
    return answer


def _damaged(picture: Picture, why: str, answer: Decoded | None = None) -> RequestError:
    why = re.sub(r"[^ -~]", "?", why)  # it may quote the picture's bytes
    return RequestError(
        f"{_name(picture, answer)} is damaged or cut off ({why}); send the whole file, or save it "
        "anew"
    )


def _name(picture: Picture, answer: Decoded | None = None) -> str:
    size = f" of {answer.width:,} x {answer.height:,} pixels" if answer and answer.width else ""
    return f"a picture ({picture.format or 'pixels'}{size})"


@functools.lru_cache(maxsize=4)
def _normalised_bytes(section: VisionSection) -> np.ndarray:
    """Return the float of each value of a byte: float32 ``[3, 256]``.

    Roundings happen in the order of transformers.
    """
    values = (np.arange(256, dtype=np.float64) * section.rescale).astype(np.float32)
    mean, std = np.array(section.mean, np.float32), np.array(section.std, np.float32)
    return np.ascontiguousarray(((values[:, None] - mean) / std).T)


@functools.cache
def _require_pillow() -> None:
    try:
        found = metadata.version("pillow")
    except metadata.PackageNotFoundError:
        found = "none"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < MIN_PILLOW:
        needed = ".".join(map(str, MIN_PILLOW))
        raise DependencyError(
            f"pictures need Pillow {needed} or newer, and {found} is installed; install it with: "
            f"{install_command('images')}"
        )
