"""Tells whether a field of a request has an effect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from edge.runtime.ask import Ask
from edge.runtime.llm import LLM
from edge_serve.api.facts import facts_of
from edge_serve.api.protocol import decode
from tests.edge_serve.scripted import Live

Pair = tuple[dict[str, Any], dict[str, Any]]
"""Changes of a request, with two values of a field."""
# What differs from answer to answer.
_CHANCE = re.compile(
    rb'"(?:id|item_id|call_id|request_id|created|created_at|completed_at|time_ms|[a-z_]+_duration)":'
    rb'(?:"[^"]*"|[0-9]+)'
)


# `tests/edge_serve/pictures` tries these, with a model that takes pictures.
PICTURE_FIELDS = {
    "messages[].content[].source",
    "messages[].content[].source.data",
    "messages[].content[].source.media_type",
    "messages[].content[].source.url",
    "messages[].content[].image_url.detail",
    "input[].content[].image_url",
    "input[].content[].detail",
    "input[].content[].file_id",
}


def fields_of(kind: type[msgspec.Struct], seen: set[type]) -> Iterator[str]:
    """Paths of all fields; those of a struct that was seen before are left out."""

    def walk(info: Any, path: str) -> Iterator[str]:
        if isinstance(info, msgspec.inspect.UnionType):
            for part in info.types:
                yield from walk(part, path)
        elif isinstance(info, msgspec.inspect.ListType):
            yield from walk(info.item_type, f"{path}[]")
        elif isinstance(info, msgspec.inspect.Metadata):
            yield from walk(info.type, path)
        elif isinstance(info, msgspec.inspect.StructType) and info.cls not in seen:
            seen.add(info.cls)
            for field in info.fields:
                name = f"{path}.{field.encode_name}".lstrip(".")
                yield name
                yield from walk(field.type, name)

    yield from walk(msgspec.inspect.type_info(kind), "")


def observe(
    live: Live, path: str, body: dict[str, Any], kind: type, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, Any]:
    """The status, and all that a request came to: for engine, route and client, and afterwards."""
    submitted: list[Any] = []
    queue = LLM.answer

    def spy(self: LLM, ask: Ask, n: int = 1) -> Any:
        # Messages and tools are in the ids, and the deadline is what the clock leaves.
        ids = self.encode_ask(ask, None)
        submitted.append((replace(ask, prompt=ids, tools=None, deadline_s=None), n))
        return queue(self, ask, n)

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "answer", spy)
        answer = live.ask(path, body)
    assert live.idle()
    text = _CHANCE.sub(b"", answer.body)
    facts = None
    if answer.status == 200 and submitted:
        facts = facts_of(decode(json.dumps(body).encode(), kind, 64), "id")
    stays_s = [model.keep_alive_s for model in live.service.models.models()]
    return answer.status, (submitted, facts, text, stays_s)


def check_field(
    live: Live,
    path: str,
    kind: type,
    bodies: tuple[dict[str, Any], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_ignored: bool,
) -> None:
    """Two bodies that differ in one field make a difference, unless it is one without effect."""
    first, second = bodies
    (one, seen), (other, also), again = (
        observe(live, path, body, kind, monkeypatch) for body in (first, second, first)
    )
    assert one == 200, seen
    assert again == (one, seen), "what it comes to is chance, so nothing can be told from it"
    if is_ignored:
        assert other == 200, also
        assert seen == also, "it has an effect, so it must leave the list"
    else:
        assert other in (200, 400, 404)
        assert (one, seen) != (other, also), "it has no effect: honour it, refuse it, or list it"
