"""Turns messages with pictures into token ids, some of which stand for rows of pictures.

A picture in a message becomes a mark, a character that occurs nowhere else in the request. The
chat template sees a part of type ``image`` in its place, or the mark itself. What the template
writes there becomes the placeholders of all the picture's rows. So only a mark can become a
placeholder: a control token in a text is plain text, as in every chat (`edge.text.chat_template`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from edge.backends import Backend
from edge.bundle.manifest import Manifest
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ContextLengthError
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.messages import refuse
from edge.text.tokenizer import Tokenizer

from .decode import decode_picture, picture_size
from .encoder import open_encoder
from .layout import Layout, plan_layout
from .picture import Picture, as_picture
from .rows import PictureRows, PictureTable
from .section import VisionSection, read_vision

CPU_TILES = 1
"""Limits the tiles of a picture on a CPU by default, not counting the whole picture's."""
_WORD = "granite"


class PromptIds(list[int]):
    """Token ids of a prompt, with its pictures.

    Attributes:
        pictures: the picture of each run of rows.
    """

    pictures: tuple[PictureRows, ...] = ()


class PicturesLengthError(ContextLengthError):
    """The prompt does not fit into the KV cache, and its pictures are a part of it.

    Attributes:
        num_rows: rows that the pictures take.
        tiles: most tiles per picture, not counting the one of the whole picture.
    """

    def __init__(
        self, num_tokens: int, capacity: int, at_least: bool, num_rows: int, tiles: int
    ) -> None:
        super().__init__(num_tokens, capacity, at_least)
        self.args = (num_tokens, capacity, at_least, num_rows, tiles)
        self.num_rows, self.tiles = num_rows, tiles

    def __str__(self) -> str:
        fewer = f"lower --image-tiles, which is {self.tiles}" if self.tiles else "send fewer"
        return f"{super().__str__()}. {self.num_rows} of them are rows of pictures: {fewer}"


class PictureReader:
    """Reads the pictures of one open bundle.

    Args:
        table: path of the bundle's token table, and its open descriptor.
        manifest: manifest of the bundle, whose files have been checked.
        backend: the decoder's backend; the encoder runs on the same device.
        config: options of the engine.
        template: the bundle's chat template; None if it has none.

    Attributes:
        section: the manifest's section ``vision``.
        tiles: most tiles per picture, not counting the one of the whole picture.
        table: the token table, with the rows of pictures.

    Raises:
        BundleError: the section, or the encoder's graph, does not fit.
        BackendError, DependencyError: the encoder cannot be opened.
    """

    def __init__(
        self,
        table: tuple[Path, int],
        manifest: Manifest,
        backend: Backend,
        config: EngineConfig,
        template: ChatTemplate | None,
    ) -> None:
        section = read_vision(manifest)
        assert section is not None, "the bundle reads pictures"
        self.section: VisionSection = section
        default = CPU_TILES if backend.name == "ort-cpu" else section.max_tiles - 1
        tiles = default if config.image_tiles is None else config.image_tiles
        self.tiles = min(tiles, section.max_tiles - 1)
        path, _ = table
        encoder = open_encoder(path.parent, manifest, section, backend, config.num_threads)
        try:
            self.table = PictureTable(*table, encoder, section.rows_per_tile)
        except BaseException:
            encoder.close()
            raise
        self._template = None if template is None else PictureTemplate(template, section)

    def encode_chat(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        **options: Any,
    ) -> PromptIds:
        """Render and encode messages with pictures, as `edge.text.chat_template.encode_chat` does.

        A user's content may be a list of ``{"type": "text", "text": ...}`` and ``{"type": "image",
        "image": X}``, where X is what `as_picture` takes.

        Raises:
            RequestError: a message is wrong, or a picture cannot be read.
            ContextLengthError: the prompt has more tokens than ``max_tokens``; no picture has been
                decoded.
            OverloadError: too many pictures wait for the encoder.
            Exception: any other error that `encode_chat` raises.
        """
        mark, plain, given = _take_pictures(messages, template.source)
        known = [self.table.find(self._digest(picture)) for picture in given]
        layouts = [
            self._layout(picture) if rows is None else rows.layout
            for picture, rows in zip(given, known, strict=True)
        ]
        assert self._template is not None, "there is a template"
        try:
            ids = encode_chat(
                tokenizer,
                self._template.filled(mark, layouts),
                plain,
                max_tokens=max_tokens,
                **options,
            )
            if given and max_tokens is not None and len(ids) >= max_tokens:
                raise ContextLengthError(len(ids), max_tokens)
        except ContextLengthError as error:
            num_rows = sum(layout.image_rows(self.section) for layout in layouts)
            if not num_rows:
                raise
            raise PicturesLengthError(
                error.num_tokens, error.capacity, error.at_least, num_rows, self.tiles
            ) from error
        found = PromptIds(ids)
        if given:
            found.pictures = tuple(
                rows or self._add(picture) for picture, rows in zip(given, known, strict=True)
            )
            self._place(found, tokenizer.control_tokens[self.section.image_token])
        return found

    def _digest(self, picture: Picture) -> str:
        return f"{picture.sha256} {self.tiles}"

    def _layout(self, picture: Picture) -> Layout:
        return plan_layout(*picture_size(picture), self.section, self.tiles)

    def _add(self, picture: Picture) -> PictureRows:
        tiles = decode_picture(picture, self.section, tiles=self.tiles)
        return self.table.add(self._digest(picture), tiles)

    def _place(self, found: PromptIds, image_id: int) -> None:
        """Replace the placeholders by the ids of the pictures' rows."""
        rows = [id_ for picture in found.pictures for id_ in picture.ids]
        places = [place for place, id_ in enumerate(found) if id_ == image_id]
        for place, row in zip(places, rows, strict=True):
            found[place] = row


class PictureTemplate(ChatTemplate):
    """A chat template that writes the placeholders of pictures.

    It accepts texts even if it was written for contents as parts only.

    Args:
        template: the bundle's chat template.
        section: the manifest's section ``vision``.
    """

    def __init__(self, template: ChatTemplate, section: VisionSection) -> None:
        self.__dict__.update(template.__dict__)  # takes over the compiled template
        self._section = section
        self._mark, self._layouts = "", tuple[Layout, ...]()
        parts = [{"type": "image"}, {"type": "text", "text": _WORD}]
        text = template._try([{"role": "user", "content": parts}]) or ""
        self._takes_parts = section.image_token in text and _WORD in text

    def filled(self, mark: str, layouts: Sequence[Layout]) -> PictureTemplate:
        """Return the template for one request.

        Args:
            mark: character that stands for a picture in a content; empty if there is none.
            layouts: layouts of the pictures, in order.
        """
        found = copy(self)
        found._mark, found._layouts = mark, tuple(layouts)
        return found

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        extra: dict[str, Any],
    ) -> str:
        if self._takes_parts:
            messages = [{**m, "content": list(self._parts(m["content"]))} for m in messages]
        rendered = super()._render(messages, add_generation_prompt, tools, extra)
        return self._fill(rendered)

    def _parts(self, content: str | None) -> Iterator[dict[str, str]]:
        """Yield the parts of a content."""
        texts = (content or "").split(self._mark) if self._mark else [content]
        for number, text in enumerate(texts):
            if number:
                yield {"type": "image"}
            if text:
                yield {"type": "text", "text": text}

    def _fill(self, rendered: str) -> str:
        """Write all placeholders of each picture, where the template wrote one for it.

        Control tokens of messages are masked here, so every placeholder found is the template's.
        """
        token = self._section.image_token
        if self._mark:
            rendered = rendered.replace(self._mark, token)
        first, *rest = rendered.split(token)
        if len(rest) != len(self._layouts):
            raise BundleError(
                f"the chat template writes {token} {len(rest)} times for {len(self._layouts)} "
                "pictures; repair the source's template and export the bundle again"
            )
        texts = [layout.placeholder_text(self._section) for layout in self._layouts]
        return first + "".join(text + after for text, after in zip(texts, rest, strict=True))


def _places(message: Any) -> list[int]:
    """Return the indices of those parts of a message's content that are pictures."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    parts = parts if isinstance(parts, list | tuple) else ()
    found = (isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
    return [position for position, is_picture in enumerate(found) if is_picture]


def _take_pictures(
    messages: Sequence[Any], source: str
) -> tuple[str, Sequence[Mapping[str, Any]], list[Picture]]:
    """Replace pictures in messages by a mark; adjacent texts are joined by newlines.

    Returns:
        The mark, the messages, and the pictures in order.
    """
    if isinstance(messages, str | Mapping) or not any(map(_places, messages)):
        return "", messages, []
    used = {*source, *json.dumps(messages, ensure_ascii=False, default=lambda _: "")}
    mark = next(char for char in map(chr, range(0xF0000, 0x110000)) if char not in used)
    plain, given = [], []
    for index, message in enumerate(messages):
        places = _places(message)
        if not places:
            plain.append(message)
            continue
        if message.get("role") != "user":
            refuse(index, f"content[{places[0]}]", "only messages of the user have pictures")
        content, joins = "", False
        for position, part in enumerate(message["content"]):
            where = f"content[{position}]"
            if position in places:
                if part.keys() != {"type", "image"}:
                    refuse(index, where, 'must be {"type": "image", "image": ...}')
                given.append(as_picture(part["image"]))
                content, joins = content + mark, False
                continue
            match part:
                case {"type": "text", "text": str(text), **rest} if not rest:
                    content, joins = content + ("\n" if joins else "") + text, True
                case _:
                    refuse(index, where, 'must be {"type": "text", "text": "..."} or a picture')
        plain.append({**message, "content": content})
    return mark, plain, given
