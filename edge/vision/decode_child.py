"""Decodes, turns, resizes and cuts a picture with Pillow, in a child of `edge.vision.decode`.

Pixels are those of transformers' processors on their Pillow backend, with two exceptions where
those look wrong. 16-bit grey is divided by 256 instead of clipped at 255, and unreadable EXIF data
does not refuse a picture. As in transformers, a picture is turned by its EXIF orientation,
transparent parts become white, an animation is its first frame, and colour profiles are ignored.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import msgspec
from PIL import Image, UnidentifiedImageError

from .decode_task import Decoded, Task
from .layout import Layout, plan_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .section import VisionSection

_BAND_PX = 256  # rows of a picture to convert at a time, so that no whole copies pile up
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5  # from this orientation on, width and height change places
# These mark EXIF data in a PNG, which may come after the pixels.
_LATE_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def prepare() -> None:
    """Import what decoders import on first use; once confined, the child cannot."""
    from PIL import MpoImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401

    Image.preinit()
    Image.MAX_IMAGE_PIXELS = None  # `Task.max_pixels` limits it, with a message that names the size
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        options = {} if name in ("GIF", "BMP") else {"exif": exif.tobytes()}
        Image.new("RGB", (16, 8)).save(file, name, **options)
        work(msgspec.msgpack.encode(Task(file.getvalue(), name, max_pixels=1 << 10)))


def work(data: bytes) -> bytes:
    """Do a `Task` and return a `Decoded`, both in MessagePack."""
    task = msgspec.msgpack.decode(data, type=Task)
    answer = Decoded()
    try:
        _do(task, answer)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its message contains the repr of an object here
        answer.why = "its header is not understood"
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, it is about the picture
        answer.why = f"{error}"[:200] or type(error).__name__
    return msgspec.msgpack.encode(answer)


def _do(task: Task, answer: Decoded) -> None:
    may_turn, has_late_exif = False, False
    if task.raw is not None:
        image: Image.Image = Image.frombytes("RGB", task.raw, task.data)
    else:
        image = Image.open(io.BytesIO(task.data), formats=[task.format])
        has_late_exif = task.format == "PNG" and any(mark in task.data for mark in _LATE_EXIF)
        # Without such a mark there is no EXIF data, and Pillow would look for it after the pixels.
        may_turn = has_late_exif or task.format != "PNG"
    answer.width, answer.height = image.size
    is_header_enough = task.section is None and not has_late_exif
    if image.width * image.height > task.max_pixels and not is_header_enough:
        answer.too_large = True
        return
    if may_turn and orientation(image) >= _SIDEWAYS:
        answer.width, answer.height = image.height, image.width
    if task.section is None:
        return
    image = upright_rgb(image)
    if image.size != (answer.width, answer.height):  # the tiles were planned by this size
        raise ValueError("its size is not what its header says")
    layout = plan_layout(*image.size, task.section, task.tiles)
    answer.pixels = b"".join(each.tobytes() for each in _tiles(image, layout, task.section))


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open picture, or 1 if it has none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - it is no part of the picture
        return 1
    return found if found in _TURNS else 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode a picture, convert it to RGB on white, and turn it the way it is shown.

    Args:
        image: the picture as Pillow opens it, an animation at its first frame.
    """
    image.load()
    turn = orientation(image)
    image = _rgb(image)
    return image if turn == 1 else image.transpose(_TURNS[turn])


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        high = 0 if image.mode.endswith("B") else 1
        image = Image.frombytes("L", image.size, image.tobytes()[high::2])
    clear = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode == "RGB" and not clear:
        return image
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND_PX):
        band = image.crop((0, top, image.width, min(top + _BAND_PX, image.height)))
        if clear:
            white = Image.new("RGBA", band.size, (255, 255, 255, 255))
            band = Image.alpha_composite(white, band.convert("RGBA"))
        result.paste(band.convert("RGB"), (0, top))
    return result


def _tiles(image: Image.Image, layout: Layout, section: VisionSection) -> Iterator[Image.Image]:
    whole, edge = image, section.tile_px
    resample = Image.Resampling(section.resample)
    for size in layout.steps:
        image = image.resize(size, resample)
    for row in range(layout.rows):
        for col in range(layout.cols):
            left, top = col * edge, row * edge
            yield image.crop((left, top, left + edge, top + edge))
    yield (image if layout.whole_of_steps else whole).resize((edge, edge), resample)
