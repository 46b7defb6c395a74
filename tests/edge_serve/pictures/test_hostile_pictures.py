"""No text that stands where a picture should takes more memory or time than its own length."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from edge_serve.api.protocol import convert
from edge_serve.http.errors import APIError
from edge_serve.pictures.parts import read_pictures
from edge_serve.settings import ServerSettings
from tests.edge_serve.scripted import RealEngine, running

_LENGTH = 14_500_000
HOSTILE = {
    "parameters without end": "data:image/png" + ";a" * (_LENGTH // 2),
    "long parameters": "data:image/png" + (";" + "a" * 100) * (_LENGTH // 101),
    "a comma after them all": "data:image/png" + ";a" * (_LENGTH // 2) + ";base64,AAAA",
    "a type without end": "data:image/" + "a" * _LENGTH,
    "spaces in base64": "data:image/png;base64," + "A " * (_LENGTH // 2 - 1),
    "a scheme alone": "data:" * (_LENGTH // 5),
}


def asked(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize("url", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_data_url_takes_no_memory(url: str) -> None:
    """A pattern over the whole text kept a context for each parameter, 850 MiB in all."""
    settings = ServerSettings()
    tracemalloc.start()
    try:
        with pytest.raises(APIError) as refused:
            read_pictures(asked(url), settings, convert, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.status == 400
    assert peak < 4 * _LENGTH
    if "base64," not in url[:1000]:
        assert peak < 1_000_000


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:image/jpeg;charset=utf-8;name=a.jpg;BASE64,",
        "data:image/png" + ";" + "a" * 100 + ";base64,",
        "data:image/png" + ";aaaaaaaaa" * 97 + ";base64,",
    ],
)
def test_a_data_url_with_parameters_is_read(head: str) -> None:
    assert len(head) <= 1_000
    (read,) = read_pictures(asked(head + "AA EC\n\tAw=="), ServerSettings(), convert, None)
    assert read["content"] == [{"type": "image", "image": bytes([0, 1, 2, 3])}]


@pytest.fixture(scope="module")
def sees_large(sees_bundle: Any) -> Iterator[Any]:
    with running(sees_bundle, RealEngine(), max_image_bytes=11_000_000) as live:
        yield live


@pytest.mark.live
@pytest.mark.parametrize("url", HOSTILE.values(), ids=HOSTILE)
def test_others_are_answered_while_a_hostile_data_url_is_read(sees_large: Any, url: str) -> None:
    """They waited for 8.4 s; now 0.1 s, and on a machine with other work at most this bound."""
    live, answers = sees_large, []
    body = json.dumps({"model": "tiny", "messages": asked(url), "max_tokens": 1}).encode()
    thread = Thread(target=lambda: answers.append(live.ask("/v1/chat/completions", raw=body)))
    worst = 0.0
    thread.start()
    while thread.is_alive():
        began = time.monotonic()
        assert live.ask("/health").status == 200
        worst = max(worst, time.monotonic() - began)
    assert answers[0].status == 400
    assert worst < 1.0
