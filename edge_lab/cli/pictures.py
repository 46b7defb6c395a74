"""Pictures of a conversation in the terminal: shown with a message, and kept in its file."""

from __future__ import annotations

from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, TypeAlias

from edge.errors import RequestError
from edge.vision.picture import as_picture

Content: TypeAlias = "str | list[dict[str, Any]]"
_DATA = "data:image/"


def picture_part(path: Path) -> dict[str, Any]:
    """Read a picture's file to a part of a message.

    Raises:
        RequestError: it cannot be read, or is no picture of a known format.
    """
    return {"type": "image", "image": as_picture(path)}


def as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """Write a message as OpenAI's clients send it, its pictures as data URIs."""
    if isinstance(message["content"], str):
        return message
    *pictures, text = message["content"]
    sent = []
    for picture in (part["image"] for part in pictures):
        data = b64encode(picture.data).decode()
        url = f"{_DATA}{picture.format.lower()};base64,{data}"
        sent.append({"type": "image_url", "image_url": {"url": url}})
    return {**message, "content": [*sent, text]}


def read_question(parts: list[dict[str, Any]]) -> Content:
    """Read what `as_sent` wrote: pictures, then a text.

    Raises:
        RequestError: it is something else.
    """
    found: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                found.append({"type": "image", "image": as_picture(_read_url(url))})
            case {"type": "text", "text": str()} if found and part is parts[-1]:
                return [*found, part]
            case _:
                break
    raise RequestError("a question in the file is not pictures, then a text")


def _read_url(url: str) -> bytes:
    head, comma, data = url.partition(";base64,")
    if not (comma and head.startswith(_DATA)):
        raise RequestError(f"a picture is no data URI in base64: {url[:40]!r}")
    try:
        return b64decode(data, validate=True)
    except ValueError as error:
        raise RequestError(f"a picture is not valid base64: {error}") from error


def describe_picture(found: dict[str, Any]) -> str:
    """Describe a result of `edge_lab.measure.picture_bench.bench_picture`."""
    decode, vision, prefill, ttft = (
        f"{found[key] * 1e3:,.1f}" for key in ("decode_s", "vision_s", "prefill_s", "ttft_s")
    )
    each = f"{found['vision_s'] / found['tiles'] * 1e3:,.1f}"
    return (
        f"picture {found['image']}: {found['tiles']} tiles, {found['rows']} rows of "
        f"{found['prompt_tokens']} prompt tokens; decoding {decode} ms, encoder {vision} ms "
        f"({each} a tile), prefill {prefill} ms, first token after {ttft} ms"
    )
