"""The buffer between the engine and one reader."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_serve.api.sse import Buffer, event
from edge_serve.http.errors import APIError


@given(st.lists(st.binary(max_size=8) | st.none(), max_size=30))
def test_a_buffer_returns_its_bytes_in_order(steps: list[bytes | None]):
    """None takes what is there."""

    async def run() -> bytes:
        buffer = Buffer(10_000)
        taken = b""
        for step in steps:
            if step is None:
                if buffer.total > len(taken):
                    taken += await buffer.take()
            else:
                buffer.put(step)
        buffer.close()
        while part := await buffer.take():
            taken += part
        return taken

    assert asyncio.run(run()) == b"".join(step for step in steps if step)


def test_a_reader_waits_for_bytes():
    async def run() -> list[bytes]:
        buffer = Buffer(100)
        reader = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)
        buffer.put(b"a")
        buffer.put(b"b")
        first = await reader
        reader = asyncio.create_task(buffer.take())
        await asyncio.sleep(0)
        buffer.close()
        return [first, await reader]

    assert asyncio.run(run()) == [b"ab", b""]


def test_a_buffer_is_bounded():
    buffer = Buffer(10)
    buffer.put(b"x" * 10)
    with pytest.raises(APIError) as caught:
        buffer.put(b"y")
    assert caught.value.code == "slow_reader"


@example("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\r\n\\\u2028")
@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_an_event_is_one_line_whatever_it_holds(value: Any):
    data = event({"value": value})
    line, end = data.decode().splitlines()  # as httpx reads it
    assert line.startswith("data: ")
    assert end == ""
    assert json.loads(line[6:]) == {"value": value}
