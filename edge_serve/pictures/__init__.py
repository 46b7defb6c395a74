"""Reads pictures in requests: from each protocol's form, and from addresses if that is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import Struct
from starlette.requests import Request

from edge.bundle.manifest import Manifest
from edge_serve.http.errors import APIError
from edge_serve.http.guard import read_body
from edge_serve.http.threads import LARGE_BYTES
from edge_serve.settings import ServerSettings

if TYPE_CHECKING:
    from .fetch import PictureFetcher

_MOST_MARKS = 2**18


class Modalities(Struct):
    """The kinds of input that a model reads, and of output that it writes."""

    input_modalities: list[Literal["text", "image"]]
    output_modalities: list[Literal["text"]]


class Entry(Protocol):
    """The part of a `edge_serve.models.registry.ModelEntry` that this module uses."""

    name: str
    manifest: Manifest


def reads_images(manifest: Manifest) -> bool:
    """Whether a bundle's model takes pictures besides text."""
    return "vision" in manifest.extras


def modalities(manifest: Manifest) -> Modalities:
    """Return the modalities of a bundle's model, for the list of models."""
    return Modalities(["text", "image"] if reads_images(manifest) else ["text"], ["text"])


def picture_models(entries: Iterable[Entry]) -> list[str]:
    """Name the served models that take pictures."""
    return [entry.name for entry in entries if reads_images(entry.manifest)]


def fetcher(settings: ServerSettings) -> PictureFetcher | None:
    """Make the fetcher of pictures by their addresses; None if that is turned off."""
    if not settings.image_urls:
        return None
    from .fetch import PictureFetcher

    return PictureFetcher(settings)


async def read_long_body(
    request: Request, settings: ServerSettings, entries: Iterable[Entry]
) -> bytes:
    """Read a body, as `read_body` does; it may be longer if a model takes pictures."""
    sees = bool(picture_models(entries))
    most_bytes = settings.most_body_bytes if sees else settings.max_body_bytes
    body = await read_body(request.scope, request.receive, settings, most_bytes)
    check_values(body, settings)
    return body


def lane_bytes(body: bytes) -> int:
    """Return the length that chooses a request's lane: a picture takes long, even a short one.

    A text that only mentions the fields of pictures counts as a long one.
    """
    return max(len(body), LARGE_BYTES) if b'"image' in body or b'_image"' in body else len(body)


def check_values(body: bytes, settings: ServerSettings) -> None:
    """Refuse a body that exceeds the limit for texts with many small values and no picture.

    To read those would take seconds of the interpreter.

    Args:
        body: JSON.
        settings: settings that limit a body without pictures.

    Raises:
        APIError: 413, the body is such.
    """
    if len(body) <= settings.max_body_bytes:
        return
    marks = body.count(b",") + body.count(b"[") + body.count(b"{")
    if marks > _MOST_MARKS:
        raise APIError(
            413,
            "content_too_large",
            f"the body has {len(body)} bytes, which is for pictures, and {marks} commas and "
            "brackets; send less",
        )
