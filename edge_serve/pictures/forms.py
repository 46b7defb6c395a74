"""Defines the forms in which protocols write a picture; an unknown field is refused."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class ImageURL(Struct, forbid_unknown_fields=True):
    """OpenAI's field ``image_url``; the server chooses how many tiles a picture has."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ImagePart(Struct, forbid_unknown_fields=True):
    """OpenAI's part of a chat; some clients write the address without an object."""

    type: Literal["image_url"]
    image_url: ImageURL | str
    prompt_cache_breakpoint: Any = None


class InputImage(Struct, forbid_unknown_fields=True, tag_field="type", tag="input_image"):
    """OpenAI's part of a response's input; it has no file id, since no files are kept."""

    image_url: str
    detail: Literal["auto", "high"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: Any = None


class Base64Source(Struct, forbid_unknown_fields=True, tag_field="type", tag="base64"):
    """The bytes of a picture, which tell its format, whatever ``media_type`` says."""

    data: str
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]


class URLSource(Struct, forbid_unknown_fields=True, tag_field="type", tag="url"):
    """The address of a picture."""

    url: str


class ImageBlock(Struct, forbid_unknown_fields=True, tag_field="type", tag="image"):
    """Anthropic's block with a picture."""

    source: Base64Source | URLSource
    cache_control: Any = None
