"""Guards the application: who may send requests, how large and how slow they may be.

Everything here reads only the connection's ``scope``, never a URL rebuilt from the Host header
(CVE-2026-48746). Once keys are set, every path needs one unless it is listed as public.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.exceptions import HTTPException

from edge_serve.settings import ServerSettings, is_loopback

from .access import APIKeys, Client, Origins, RateLimit, is_admin, is_cross_site, is_local
from .bodies import BodyAccount, BodyBudget
from .errors import APIError, as_api_error, draining
from .threads import check_there

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
ErrorBody = Callable[[APIError, Scope], bytes]

PUBLIC = frozenset({"/health", "/ready"})
"""Paths that need no key; the application adds the page."""

PROBES = PUBLIC | {"/metrics", "/stats"}
"""Paths that are polled: logged only at DEBUG, and answered even if all connections are in use."""

_log = logging.getLogger("edge_serve")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LENGTH = re.compile(rb"[0-9]{1,19}")
_ABSOLUTE = re.compile(rb"https?://([^/@]{1,300})(?=/|$)", re.IGNORECASE)
# A refused body is read up to these bounds, so that its sender sees the answer and not a reset.
_DISCARD_FACTOR = 4
_DISCARD_S = 1.0
_BURST_S = 10
# Letters, digits and -._~, which no client has to escape (RFC 3986 2.3).
_NEEDLESS = re.compile(rb"%(2[DE]|3[0-9]|4[1-9A-F]|5[0-9AF]|6[1-9A-F]|7[0-9AE])", re.IGNORECASE)


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: limits of the server.
        keys: API keys; None lets everyone in.
        public: paths that need no key, besides `PUBLIC`.
        is_draining: returns whether the server is about to stop.
        on_rejection: called with the code of every error that the guard answers.
        on_end: called when a request has ended, with the bytes of its body.
        on_ignored_client: called when ``x-edge-client`` comes from no trusted proxy.
        error_body: writes an error in the form of the path's protocol.
        arrivals: limits how much one address may send; None makes a limit from the settings.
    """

    def __init__(
        self,
        app: App,
        settings: ServerSettings,
        keys: APIKeys | None,
        *,
        public: frozenset[str] = frozenset(),
        is_draining: Callable[[], bool] = lambda: False,
        on_rejection: Callable[[str], None] = lambda code: None,
        on_end: Callable[[int], None] = lambda num_bytes: None,
        on_ignored_client: Callable[[], None] = lambda: None,
        error_body: ErrorBody = lambda error, scope: error.body(),
        arrivals: RateLimit | None = None,
    ) -> None:
        self._app = app
        self._error_body = error_body
        self._settings = settings
        self._keys = keys
        self._public = PUBLIC | public
        self._is_draining = is_draining
        self._on_rejection = on_rejection
        self._on_end = on_end
        self._origins = Origins(settings.proxy_networks, on_ignored_client)
        self._rate = RateLimit(settings.rate_limit_rpm)
        self._arrivals = arrivals or limit_arrivals(settings)
        self._bodies = BodyBudget(settings.max_inflight_body_bytes, settings.most_body_bytes)
        self._under_way: Counter[str] = Counter()  # requests by the name of their key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the head of a request, pass it on, answer its errors, and log it."""
        if scope["type"] != "http":
            return  # lifespan and WebSockets are not supported
        headers = _Headers(scope["headers"])
        _take_absolute(scope, headers)
        request_id = scope["request_id"] = _request_id(headers)
        connection = scope.get("state", {}).get("connection")
        body = _Body(receive, headers, connection)
        key: str | None = None
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),  # where Anthropic's clients look
                    (b"x-content-type-options", b"nosniff"),
                ]
                if not body.is_complete:
                    # Nobody will read the rest, and it could drip in forever.
                    extra.append((b"connection", b"close"))
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            origin = self._count(scope, headers)
            if connection is not None and connection.is_surplus and scope["path"] not in PROBES:
                raise APIError(
                    503,
                    "too_many_connections",
                    "all connections are in use; try again in a moment",
                    retry_after_s=1,
                    close=True,
                )
            self._check(scope, headers, origin)
            if self._keys is not None and scope["path"] not in self._public | PROBES:
                key = self._enter(scope["client_name"])
            body.account = self._bodies.account(scope["client_identity"].origin)
            body.account.check(min(_length(headers), self._settings.max_body_bytes))
            await self._app(scope, body, send_with_id)
        except ConnectionError:
            status = status or 499  # nginx's number for a client that left
            if connection is not None:
                connection.abort()
        except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - nothing above can answer, a panic neither
            answer = _as_answer(error)
            if answer.status in (500, 501):
                _log.exception("request %s failed", request_id)
            elif answer.code == "insufficient_memory":
                cause = error.__cause__ if isinstance(error, APIError) else error
                _log.error("request %s failed: %s", request_id, cause)
            if scope["path"] not in PROBES:
                self._on_rejection(answer.code)
            if status:
                return  # too late for another status; the server cuts the connection
            if not (body.is_complete or answer.status == 408 or headers.has(b"expect")):
                await body.discard(_DISCARD_FACTOR * self._settings.max_body_bytes)
            await send_error(send_with_id, answer, self._error_body(answer, scope))
        finally:
            if key is not None:
                self._leave(key)
            if body.account is not None:
                body.account.close()
            self._on_end(body.num_bytes)
            _log.log(
                logging.DEBUG if scope["path"] in PROBES else logging.INFO,
                "%s %s %d %.1f ms",
                scope["method"],
                scope["path"][:200],
                status,
                (time.perf_counter() - started) * 1e3,
                extra={"request_id": request_id, "client": scope.get("client_name")},
            )

    def _enter(self, key: str) -> str:
        """Count a request of a key."""
        limit = self._settings.max_connections_per_key
        if self._under_way[key] >= limit:
            raise APIError(
                429,
                "too_many_connections",
                f"this API key has {limit} requests under way; wait for one of them",
                retry_after_s=1,
            )
        self._under_way[key] += 1
        return key

    def _leave(self, key: str) -> None:
        self._under_way[key] -= 1

    def _count(self, scope: Scope, headers: _Headers) -> str:
        """Count a request of the address that it comes from; return that address.

        Raises:
            APIError: 429, it sends too many.
        """
        address = scope.get("client")
        origin = self._origins.find(address[0] if address else "", headers.get(b"x-edge-client"))
        wait_s = self._arrivals.take(origin) if origin else 0.0  # no address in this process
        if wait_s:
            raise too_fast(self._settings, wait_s)
        return origin

    def _check(self, scope: Scope, headers: _Headers, origin: str) -> None:
        settings = self._settings
        if scope["http_version"] not in ("1.0", "1.1"):
            raise APIError(505, "http_version", "speak HTTP/1.1", close=True)
        if headers.num_bytes + len(scope["raw_path"]) > settings.max_header_bytes:
            raise APIError(
                431,
                "header_too_large",
                f"the request's head exceeds {settings.max_header_bytes} bytes; send less",
                close=True,
            )
        needless = _NEEDLESS.search(scope["raw_path"])
        if needless:
            # A proxy in front that closes a path compares it as it is written.
            written = needless[0].decode("ascii")
            raise APIError(
                400,
                "needless_escape",
                f"the path has {written}, which is {unquote(written)!r} and needs no escape; write "
                "the character itself",
            )
        if headers.has(b"transfer-encoding") and headers.has(b"content-length"):
            # A proxy in front may read one, and this server the other (request smuggling).
            raise APIError(
                400,
                "ambiguous_length",
                "the request has both Transfer-Encoding and Content-Length; send one of them",
                close=True,
            )
        check_host(settings, self._keys, headers.get(b"host"))
        if self._keys is None and is_cross_site(scope["method"], headers.get):
            raise APIError(
                403,
                "cross_site",
                "a web page of another site sent this, and without API keys the server answers "
                "programs and its own page only",
                close=True,
            )
        self._authenticate(scope, headers, origin)
        if scope["method"] == "POST" and self._is_draining():
            raise draining()

    def _authenticate(self, scope: Scope, headers: _Headers, origin: str) -> None:
        client: Client | None = None
        if self._keys is not None:
            client = self._keys.find(headers.get(b"authorization"), headers.get(b"x-api-key"))
            if client is None and scope["path"] not in self._public:
                raise APIError(
                    401,
                    "invalid_api_key",
                    "no valid API key; send it as Authorization: Bearer KEY or as x-api-key: KEY",
                )
        address = scope.get("client")
        if client is not None and origin != self._origins.find(address[0] if address else "", None):
            # A trusted proxy's key serves all its clients: each has its own share and prefixes.
            client = Client(client.name, f"{client.salt}/{origin}", origin)
        client = client or Client(origin=origin)
        scope["client_identity"] = client
        scope["client_name"] = client.name
        scope["is_admin"] = is_admin(
            client,
            address[0] if address else None,
            None if self._keys is None else self._settings.admin_keys,
            headers.get,
        )
        if scope["method"] == "POST":
            wait_s = self._rate.take(client.name)
            if wait_s:
                raise APIError(
                    429,
                    "rate_limit_exceeded",
                    f"more than {self._settings.rate_limit_rpm} requests a minute; wait",
                    retry_after_s=wait_s,
                )


def check_host(settings: ServerSettings, keys: APIKeys | None, host: bytes | None) -> None:
    """Refuse another host's name; without keys, a web page could reach us by its own DNS name.

    Raises:
        APIError: 403, the header names another host.
    """
    if keys is None and is_loopback(settings.host) and not (host is None or is_local(host)):
        raise APIError(
            403,
            "host_not_allowed",
            "this server answers to localhost only while it has no API keys",
            close=True,
        )


def limit_arrivals(settings: ServerSettings) -> RateLimit:
    """Make the limit on what one address may send: its rate, and `_BURST_S` of it at once."""
    rps = settings.rate_limit_address_rps
    return RateLimit(60 * rps, burst=_BURST_S * rps)


def too_fast(settings: ServerSettings, wait_s: float) -> APIError:
    """Make a 429: an address sends too many requests."""
    return APIError(
        429,
        "address_rate_exceeded",
        f"more than {settings.rate_limit_address_rps} requests a second come from this address; "
        "send fewer",
        retry_after_s=wait_s,
        close=True,
    )


class _Headers:
    """A request's headers."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._first: dict[bytes, bytes] = {}
        self.num_bytes = 0
        for name, value in raw:
            self._first.setdefault(name, value)
            self.num_bytes += len(name) + len(value) + 4

    def has(self, name: bytes) -> bool:
        return name in self._first

    def get(self, name: bytes) -> bytes | None:
        return self._first.get(name)

    def put(self, name: bytes, value: bytes) -> None:
        self._first[name] = value


def _take_absolute(scope: Scope, headers: _Headers) -> None:
    """Read a target in absolute form, whose host replaces the header (RFC 9112 3.2.2)."""
    found = _ABSOLUTE.match(scope["raw_path"])
    if found:
        headers.put(b"host", found[1])
        scope["raw_path"] = scope["raw_path"][found.end() :] or b"/"
        scope["path"] = unquote(scope["raw_path"].decode("ascii"))


def _length(headers: _Headers) -> int:
    """Return the value of Content-Length; 0 if it is missing or no number."""
    length = headers.get(b"content-length") or b"0"
    return int(length) if _LENGTH.fullmatch(length) else 0


def _request_id(headers: _Headers) -> str:
    given = headers.get(b"x-request-id") or b""
    return given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)


def _check_body_headers(scope: Scope, limit: int) -> None:
    headers = _Headers(scope["headers"])
    if (headers.get(b"content-encoding") or b"identity").strip().lower() != b"identity":
        raise APIError(415, "unsupported_encoding", "send the body without Content-Encoding")
    kind = (headers.get(b"content-type") or b"").split(b";")[0].strip().lower()
    # This also keeps web pages out: for this type browsers ask first, and CORS is off.
    if kind != b"application/json":
        found = f"Content-Type {kind[:80].decode('latin-1')!r}" if kind else "no Content-Type"
        raise APIError(
            415,
            "unsupported_media_type",
            f"the body has {found}; send it as Content-Type: application/json",
        )
    length = headers.get(b"content-length") or b"0"
    if not _LENGTH.fullmatch(length):
        raise APIError(400, "invalid_length", "Content-Length is not a number", close=True)
    if int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> APIError:
    return APIError(
        413, "content_too_large", f"the body exceeds {limit} bytes; send less", close=True
    )


async def read_body(
    scope: Scope, receive: Receive, settings: ServerSettings, most_bytes: int
) -> bytes:
    """Read the body of a request, which must be JSON of at most this length.

    Raises:
        APIError: 413 if it is too large, 408 if it is too slow, 415 if it is not JSON.
        ConnectionError: the client left, at the latest after its last byte.
    """
    _check_body_headers(scope, most_bytes)
    parts: list[bytes] = []

    async def read() -> None:
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client left before its request was complete")
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            if num_bytes > most_bytes:
                raise _too_large(most_bytes)
            if not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(read(), settings.body_timeout_s)
        check_there(receive)
        return b"".join(parts)
    except asyncio.TimeoutError:
        raise APIError(
            408,
            "body_timeout",
            f"the body did not arrive within {settings.body_timeout_s:g} s",
            close=True,
            should_retry=False,
        ) from None
    finally:
        parts.clear()  # an error's traceback leads here, and may live until a garbage collection


class _Body:
    """The body of a request as it arrives, with a record of its end; this is ASGI's `receive`."""

    def __init__(self, receive: Receive, headers: _Headers, connection: Any = None) -> None:
        self._receive = receive
        self._connection = connection
        self.account: BodyAccount | None = None
        self.num_bytes = 0
        length = headers.get(b"content-length")
        self.is_complete = not headers.has(b"transfer-encoding") and length in (None, b"0")

    @property
    def has_left(self) -> bool:
        """Whether the client has left; `check_there` asks for it."""
        return self._connection is not None and self._connection.has_left

    async def __call__(self) -> Message:
        """Receive the next message."""
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.is_complete = True
        self.num_bytes += len(message.get("body", b""))
        if self.account is not None:
            self.account.grow_to(self.num_bytes)
        return message

    async def discard(self, limit_bytes: int) -> None:
        """Read what a refused client still sends, within bounds, so that it sees the answer."""
        if self.account is not None:
            self.account.close()  # the rest is read and dropped
            self.account = None

        async def read() -> None:
            total = 0
            while not self.is_complete and total <= limit_bytes:
                total += len((await self()).get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), _DISCARD_S)


def _as_answer(error: BaseException) -> APIError:
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return APIError(
                405, "method_not_allowed", f"this path takes {allowed} only", allow=allowed
            )
        return APIError(404, "not_found", "there is no such path; GET /openapi.json lists them")
    return as_api_error(error)


async def send_error(send: Send, error: APIError, body: bytes) -> None:
    """Answer with an error; ``body`` is its JSON."""
    headers = error.headers() | {"content-length": str(len(body))}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
