"""A model that reads pictures, real but tiny, and what it is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.runtime.ask import Ask
from edge.runtime.llm import LLM
from tests.edge_serve.scripted import Live, RealEngine, running

_Encode = Callable[[LLM, Ask, "int | None", Any], list[int]]


@pytest.fixture(scope="module")
def sees(sees_bundle: Path) -> Iterator[Live]:
    bounds: dict[str, Any] = {"max_body_bytes": 20_000, "max_image_bytes": 60_000}
    with running(sees_bundle, RealEngine(), **bounds) as live:
        yield live


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each `Ask` of the model, the pictures included; it reads the texts alone."""
    found: list[Any] = []
    encode: _Encode = LLM.encode_ask

    def encode_ask(llm: LLM, ask: Ask, most: int | None, on_piece: Any = None) -> list[int]:
        found.append(ask)
        messages: Any = [dict(message) for message in ask.prompt]  # type: ignore[arg-type]
        for message in messages:
            if isinstance(message["content"], list):
                texts = [part for part in message["content"] if part["type"] == "text"]
                message["content"] = texts or "picture"
        return encode(llm, dataclasses.replace(ask, prompt=messages), most, on_piece)

    monkeypatch.setattr(LLM, "encode_ask", encode_ask)
    return found
