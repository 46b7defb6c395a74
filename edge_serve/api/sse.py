"""Writes server-sent events, through a bounded buffer between the engine and one reader."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.responses import Response

from edge_serve.http.errors import APIError, as_api_error
from edge_serve.http.guard import Receive, Scope, Send
from edge_serve.http.threads import ClientGoneError, until_gone
from edge_serve.json_lines import json_line
from edge_serve.models.flight import Flight

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(value: Any) -> bytes:
    """Encode one event."""
    return b"data: " + json_line(value) + b"\n"


def named_event(name: str, value: Any) -> bytes:
    """Encode one event with a name."""
    return b"event: " + name.encode() + b"\n" + event(value)


class StreamForm(Protocol):
    """The part of a `edge_serve.api.respond.Render` that an `EventStream` uses."""

    media_type: str

    def ping(self) -> bytes: ...  # noqa: D102

    def failed(self, error: APIError) -> bytes: ...  # noqa: D102


class Buffer:
    """Bytes on their way to one reader; filled and emptied in the same event loop.

    Args:
        limit_bytes: the most bytes that may wait.

    Attributes:
        total: number of bytes ever put in.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self.total = 0
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def put(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            APIError: the reader is too slow; its request should end.
        """
        self._parts.append(data)
        self._num_bytes += len(data)
        self.total += len(data)
        self._wake()
        if self._num_bytes > self._limit_bytes:
            raise APIError(
                408,
                "slow_reader",
                f"more than {self._limit_bytes} bytes wait for the client to read them",
            )

    def close(self) -> None:
        """End the stream; bytes that wait can still be taken."""
        self._closed = True
        self._wake()

    async def take(self) -> bytes:
        """Wait for bytes and take all of them; empty at the end."""
        while not self._parts and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        data = b"".join(self._parts)
        self._parts.clear()
        self._num_bytes = 0
        return data

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EventStream(Response):  # type: ignore[misc]
    """Streams the bytes that a flight's choices put into the buffer.

    The status is sent with the first bytes, so a request that fails earlier gets a proper status.
    A later error becomes an event in the protocol's form and ends the stream. For OpenAI's chats
    that is ``data: {"error": ...}`` without ``[DONE]``: a clean end would look like a whole answer.
    """

    def __init__(
        self,
        flight: Flight,
        buffer: Buffer,
        form: StreamForm,
        ping_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers},
            media_type=form.media_type,
        )
        del self.headers["content-length"]
        self._flight = flight
        self._buffer = buffer
        self._form = form
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the flight ends or the client leaves."""
        flight, buffer = self._flight, self._buffer
        flight.done.add_done_callback(lambda _: buffer.close())
        flight.receive = receive
        gone = asyncio.create_task(until_gone(receive))
        gone.add_done_callback(lambda _: flight.abort(ClientGoneError("the client left")))
        pinger = asyncio.create_task(self._ping())
        try:
            await self._write(send)
        finally:
            pinger.cancel()
            gone.cancel()  # also ends the flight if it still runs

    async def _write(self, send: Send) -> None:
        started = False
        while data := await self._buffer.take():
            if not started:
                started = True
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
            await send({"type": "http.response.body", "body": data, "more_body": True})
        error = self._flight.done.exception() if self._flight.done.done() else None
        if isinstance(error, ClientGoneError):
            return
        if error is not None and not started:
            raise error
        tail = b"" if error is None else self._form.failed(as_api_error(error))
        await send({"type": "http.response.body", "body": tail, "more_body": False})

    async def _ping(self) -> None:
        """Fill each silence, so that no proxy takes the stream for dead."""
        while True:
            before = self._buffer.total
            await asyncio.sleep(self._ping_s)
            if self._buffer.total == before and (filling := self._form.ping()):
                self._buffer.put(filling)
