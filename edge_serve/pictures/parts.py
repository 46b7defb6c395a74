"""Reads the pictures of a request, in any protocol's form, into the parts that `LLM` takes.

A protocol puts a `Picture` where the client has one, with the field's name; OpenAI's own
``image_url`` is read here. `read_pictures` turns them all into bytes, within the server's limits,
before anything else reads the request's texts. The engine's decoder finds the format in the bytes,
not in the type that the client names.
"""

from __future__ import annotations

import binascii
import re
import string
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from edge_serve.http.errors import invalid
from edge_serve.settings import ServerSettings

from .forms import Base64Source, ImagePart, URLSource

_DATA = re.compile(r"data:image/[^;,]{1,100}(?:;[^;,]{1,100})*;base64,", re.IGNORECASE)
_MOST_HEAD = 1_000  # characters of a data URI up to its comma; the pattern never sees more
_ADDRESS = re.compile(r"https?:", re.IGNORECASE)
_SPACES = string.whitespace.encode()
_SEND = "send data:image/png;base64, and the picture's bytes in base64 after it"


class Picture(Struct):
    """A picture as the client sent it.

    Attributes:
        given: base64, or an address: a data URI or one that was not fetched.
        where: name of the request's field.
        is_address: whether it is an address.
    """

    given: str
    where: str
    is_address: bool = True


def part_of(given: str, where: str, *, is_address: bool = True) -> dict[str, Any]:
    """Make the part of a message for a picture; the arguments are `Picture`'s."""
    return {"type": "image", "image": Picture(given, where, is_address)}


def part_of_source(source: Base64Source | URLSource, where: str) -> dict[str, Any]:
    """Make the part of a message for a block of Anthropic's API."""
    if isinstance(source, URLSource):
        return part_of(source.url, f"{where}.url")
    return part_of(source.data, f"{where}.data", is_address=False)


def with_images(text: str, images: Sequence[str] | None, where: str) -> str | list[dict[str, Any]]:
    """Join a text and pictures in base64 into a content; Ollama puts pictures before the text."""
    if not images:
        return text
    parts = [
        part_of(given, f"{where}[{index}]", is_address=False) for index, given in enumerate(images)
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def why_refused(name: str, picture_models: Sequence[str]) -> str | None:
    """Say that a model takes no pictures, and which do; None if it does."""
    if name in picture_models:
        return None
    others = " or ".join(map(repr, picture_models[:5]))
    what = (
        f"name {others} in the field model, which reads pictures, too"
        if others
        else "no model that is served here reads pictures, so leave it out"
    )
    return f"the model {name!r} reads text only; {what}"


def is_picture(part: object) -> bool:
    """Whether a part of a message is a picture, in OpenAI's form or from another protocol."""
    return isinstance(part, dict) and part.get("type") in ("image_url", "image")


def has_pictures(prompt: Any) -> bool:
    """Whether a prompt is messages of which any part is a picture."""
    messages = prompt if isinstance(prompt, list) else []
    contents = (each.get("content") for each in messages if isinstance(each, dict))
    return any(any(map(is_picture, each)) for each in contents if isinstance(each, list))


def read_pictures(
    messages: Sequence[Mapping[str, Any]],
    settings: ServerSettings,
    convert: Callable[[Any, type[ImagePart], str], ImagePart],
    why_not: str | None,
) -> list[dict[str, Any]]:
    """Return the messages with each picture replaced by its bytes.

    Args:
        messages: messages as OpenAI's clients send them, or as other protocols convert them.
        settings: settings that limit pictures.
        convert: `edge_serve.api.protocol.convert`.
        why_not: why this model takes no pictures; None if it does.

    Raises:
        APIError: 400, the model takes none; one cannot be read; or there are too many.
    """
    bounds = _Bounds(settings)
    read = []
    for index, message in enumerate(messages):
        copy = dict(message)
        if isinstance(message.get("content"), list):
            copy["content"] = list(message["content"])
            for position, part in enumerate(copy["content"]):
                if is_picture(part):
                    picture = _picture(part, f"messages[{index}].content[{position}]", convert)
                    if why_not is not None:
                        raise invalid(f"{picture.where}: {why_not}", picture.where)
                    data = bounds.take(picture)
                    copy["content"][position] = {"type": "image", "image": data}
        read.append(copy)
    return read


class _Bounds:
    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._count = self._bytes = 0

    def take(self, picture: Picture) -> bytes:
        """Return the bytes of one more picture of a request."""
        most, where = self._settings.max_images, picture.where
        self._count += 1
        if self._count > most:
            raise invalid(
                f"{where}: a request may have {most} pictures, and this is one more; send fewer",
                where,
            )
        data = _bytes_of(picture)
        self._bytes += len(data)
        if self._bytes > self._settings.max_image_bytes:
            raise invalid(
                f"{where}: the pictures of a request may have {self._settings.max_image_bytes} "
                f"bytes together, and up to this one they have {self._bytes}; make them smaller "
                "or send fewer",
                where,
            )
        return data


def _picture(
    part: dict[str, Any], where: str, convert: Callable[[Any, type[ImagePart], str], ImagePart]
) -> Picture:
    if isinstance(part.get("image"), Picture):  # not from JSON, so a protocol made it
        made: Picture = part["image"]
        return made
    if part["type"] == "image":
        raise invalid(f'{where}.type: send "image_url", and the picture as a data URI', where)
    read = convert(part, ImagePart, where)
    if isinstance(read.image_url, str):
        return Picture(read.image_url, f"{where}.image_url")
    return Picture(read.image_url.url, f"{where}.image_url.url")


def _bytes_of(picture: Picture) -> bytes:
    given, where = picture.given, picture.where
    if picture.is_address:
        if _ADDRESS.match(given):
            raise invalid(
                f"{where}: pictures are not fetched, as the operator of this server has not set "
                f"image_urls; {_SEND}",
                where,
            )
        comma = given.find(",", 0, _MOST_HEAD)
        if not _DATA.fullmatch(given, 0, comma + 1):
            raise invalid(
                f"{where}: this is no picture in a data URI: {given[:40]!r}; {_SEND}", where
            )
        given = given[comma + 1 :]
    elif given[:5].lower() == "data:":
        raise invalid(f"{where}: send the base64 alone, without data: and what follows", where)
    try:
        data = b64decode(given.encode("ascii").translate(None, _SPACES), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{where}: the picture is not valid base64 ({error})", where) from None
    if not data:
        raise invalid(f"{where}: the picture has no bytes; send the whole file", where)
    return data
