"""Runs uvicorn with the guards that it lacks: slow heads, slow readers, too many connections.

uvicorn waits forever for the rest of a head and for a reader that does not read, and answers
malformed requests in plain text. Hypercorn has read timeouts, but they also end an answer that
streams for longer than the timeout, while the client rightly sends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_serve.settings import Network, ServerSettings

from .access import RateLimit, address_group, is_in
from .connections import Connections, has_left
from .errors import APIError
from .guard import App, too_fast

_READ_BYTES = 64 * 2**10
_PIECE_BYTES = 4 * 2**10
_FRAMING_BYTES = 16 * 2**10  # the most framing of a chunked body, unless the body is longer


class _Protocol(H11Protocol):  # type: ignore[misc]
    """One connection: uvicorn's protocol with timers for heads and readers, and a limit."""

    settings: ServerSettings  # these are set by the subclass that `make_server` makes
    open_connections: Connections
    arrivals: RateLimit
    trusted: Sequence[Network]
    on_rejection: Callable[[str], None]
    group = ""
    is_surplus = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.group = address_group(self.client[0]) if self.client else ""
        self.app_state = {"connection": self}  # the guard finds it in the request's scope
        # A client may send ahead while it is being answered; asyncio would take 256 KiB of it.
        with contextlib.suppress(AttributeError):
            transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self.open_connections.add(self)
        if transport.is_closing():
            return
        # Writing is paused as soon as the system takes no more: "paused" means a slow reader.
        transport.set_write_buffer_limits(high=0)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_connections.remove(self)
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    @property
    def waits_for_client(self) -> bool:
        """Implement `Connection.waits_for_client`."""
        if self.cycle is None or self.cycle.response_complete or self.flow.write_paused:
            return True
        return self.conn.their_state is h11.SEND_BODY

    @property
    def has_left(self) -> bool:
        """Whether the client has left, even if nothing it sent has been read yet."""
        sock = self.transport.get_extra_info("socket")
        return self.transport.is_closing() or sock is None or has_left(sock)

    def abort(self) -> None:
        """Implement `Connection.abort`."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # else uvicorn misses an answer until it hears of it
        self.transport.abort()

    def on_response_complete(self) -> None:
        self.open_connections.touch(self)
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        self.open_connections.touch(self)
        if self.conn.their_state is h11.IDLE and self._is_too_fast():
            return
        for start in range(0, len(data), _PIECE_BYTES):
            self._take(data[start : start + _PIECE_BYTES])
            if self.transport.is_closing():
                return
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None:
            # These are the first bytes of the next head on an idle connection.
            self._start_head_timer()

    def _is_too_fast(self) -> bool:
        """Whether its address has sent too much; if so, answer that and parse nothing.

        The guard counts requests, since it knows which client a trusted proxy asks for.
        """
        wait_s = self.arrivals.wait_s(self.group)
        if not wait_s or (self.client is not None and is_in(self.client[0], self.trusted)):
            return False
        error = too_fast(self.settings, wait_s)
        self.on_rejection(error.code)
        self._answer_and_close(error)
        return True

    def _take(self, piece: bytes) -> None:
        """Parse received bytes, unless they are tiny chunks of a body: each costs a whole pass."""
        cycle = self.cycle
        held = 0 if cycle is None else len(cycle.body)
        super().data_received(piece)
        if self.cycle is not cycle:  # a head ended here
            self._body_bytes = self._framing_bytes = 0
        elif self.conn.their_state is h11.SEND_BODY:
            num_bytes = len(cycle.body) - held
            self._body_bytes += num_bytes
            self._framing_bytes += len(piece) - num_bytes
            if self._framing_bytes > max(_FRAMING_BYTES, self._body_bytes):
                message = "the body comes in too many small chunks; send it in larger ones"
                self._answer_and_close(APIError(400, "invalid_http", message))

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._start_write_timer()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _late_reader(self, waiting_bytes: int) -> None:
        if self.transport.get_write_buffer_size() < waiting_bytes:
            self._start_write_timer()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with the envelope instead of uvicorn's own text."""
        waiting, _ = self.conn.trailing_data
        if len(waiting) > self.settings.max_header_bytes:
            error = APIError(431, "header_too_large", "the request's head is too large; send less")
        else:
            error = APIError(400, "invalid_http", "this is not valid HTTP/1.1")
        self._answer_and_close(error)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: the JDK's client offers h2c in each request, and takes HTTP/1.1 as well."""

    def _late_head(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        waiting, _ = self.conn.trailing_data
        if waiting:
            self._answer_and_close(
                APIError(408, "header_timeout", "the request's head did not arrive in time")
            )
        else:
            self.transport.close()

    def _answer_and_close(self, error: APIError) -> None:
        body = error.body()
        headers = error.headers() | {"connection": "close", "content-length": str(len(body))}
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has already begun
            for event in (
                h11.Response(status_code=error.status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.header_timeout_s, self._late_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_write_timer(self) -> None:
        waiting_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(
            self.settings.write_timeout_s, self._late_reader, waiting_bytes
        )

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's server, without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `edge_serve.run`."""
        yield


def make_server(
    app: App,
    settings: ServerSettings,
    connections: Connections,
    arrivals: RateLimit | None = None,
    on_rejection: Callable[[str], None] = lambda code: None,
) -> Server:
    """Make the server of an application; it stops once ``should_exit`` is set.

    Args:
        app: the application.
        settings: limits of the server.
        connections: limits how many connections are open at once.
        arrivals: limits how much one address may send; the application's guard counts in it.
        on_rejection: called with the code of each refusal of bytes that are not yet a request.
    """
    fields = {
        "settings": settings,
        "open_connections": connections,
        "arrivals": arrivals or RateLimit(0),
        "trusted": settings.proxy_networks,
        "on_rejection": staticmethod(on_rejection),
    }
    protocol: type[Any] = type("Protocol", (_Protocol,), fields)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.idle_connection_s,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        backlog=2048,
    )
    config.load()  # now, not with the first connections: it imports modules, which takes files
    return Server(config)
