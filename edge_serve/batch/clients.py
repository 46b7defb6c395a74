"""Answers one request: by a server of OpenAI's API, or by our own application in this process."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import http.client
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import msgspec

from edge.errors import BackendError, ConfigError, DependencyError, install_command
from edge.files import MALFORMED
from edge_serve.settings import ServerSettings

if TYPE_CHECKING:
    from edge_serve.http.guard import App
    from edge_serve.models.registry import ModelRegistry

CONNECT_S = 10.0
MAX_ANSWER_BYTES = 64 * 2**20
DEFAULT_CONCURRENCY = 4
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Notices a server that lost its power after 90 s, however long an answer may take."""
_BEAT_S = 0.25
_CLOSE_S = 5.0


@dataclass(frozen=True)
class HttpAnswer:
    """An HTTP answer.

    Attributes:
        status: HTTP's status code.
        headers: headers by their names in lower case.
        body: the body, unchanged.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def may_retry(self) -> bool:
        """Whether the server does not forbid another try."""
        return self.headers.get("x-should-retry", "").lower() != "false"

    @property
    def retry_after_s(self) -> float | None:
        """Seconds that the server asks to wait; None if it says nothing readable."""
        given = self.headers.get("retry-after", "")
        if given.strip().isdigit():
            return float(given)
        try:
            until = email.utils.parsedate_to_datetime(given).timestamp()
        except (ValueError, OverflowError, TypeError):
            return None
        try:  # relative to the server's own clock, if it sends its time
            now = email.utils.parsedate_to_datetime(self.headers.get("date", "")).timestamp()
        except (ValueError, OverflowError, TypeError):
            now = time.time()
        return max(0.0, until - now)


class NoAnswerError(Exception):
    """The server gave no answer.

    Attributes:
        was_sent: whether it may have seen the request.
    """

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class Asker(Protocol):
    """Answers requests, several at once.

    Attributes:
        name: name of what answers, for messages.
        concurrency: number of requests that keep it busy, once it is ready.
    """

    name: str
    concurrency: int

    async def ready(self) -> HttpAnswer | None:
        """Get ready; return None, or the answer that says that it is not ready yet.

        Raises:
            EdgeError: it will never be ready.
            NoAnswerError: it cannot be reached now.
        """
        ...

    async def ask(self, url: str, body: bytes) -> HttpAnswer:
        """Answer a request.

        Raises:
            BackendError: no request will be answered any more.
            NoAnswerError: there was no answer.
        """
        ...

    async def close(self) -> None:
        """End requests in progress."""
        ...


class HttpAsker:
    """A server of OpenAI's API.

    Args:
        url: address of the server, with or without ``/v1`` at the end.
        api_key: sent as a bearer token; None sends none.
        concurrency: requests at once; None asks ``/stats`` of edge-llm for its slots and takes one
            more, so that none idles, or takes `DEFAULT_CONCURRENCY`.
        timeout_s: seconds that an answer may take.
        priority: value of the header ``Priority``.

    Raises:
        ConfigError: the URL is not that of a server, or its path cannot be asked for as it is.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        concurrency: int | None,
        timeout_s: float,
        priority: str,
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _no_url(url) from error
        extra = parts.query or parts.fragment or parts.username is not None
        if parts.scheme not in ("http", "https") or not parts.hostname or extra:
            raise _no_url(url)
        if not re.fullmatch("[!-~]*", parts.path):
            raise ConfigError(
                f"the path of {url!r} has a space or a character beyond ASCII; write it as %20, say"
            )
        self.name = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port = parts.hostname, port
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json", "priority": priority}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self._given = concurrency
        self.concurrency = concurrency or DEFAULT_CONCURRENCY
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._is_closed = False

    async def ready(self) -> HttpAnswer | None:
        """Implement `Asker.ready`."""
        answer = await asyncio.to_thread(self._exchange, "GET", "/v1/models", None, CONNECT_S)
        if answer.status in (429, 500, 502, 503, 504):
            return answer
        if answer.status in (401, 403):
            raise refused_key(self.name, answer)
        if answer.status != 200:
            raise ConfigError(
                f"{self.name}{self._path}/v1/models answered {answer.status}; give --url of a "
                "server of OpenAI's API"
            )
        if self._given is None:
            self.concurrency = await asyncio.to_thread(self._slots)
        while self._idle:  # each worker makes its own
            self._idle.pop().close()
        self._executor = ThreadPoolExecutor(self.concurrency, thread_name_prefix="edge-batch")
        return None

    def _slots(self) -> int:
        try:
            answer = self._exchange("GET", "/stats", None, CONNECT_S)
            models = msgspec.json.decode(answer.body)["models"].values()
            return sum(len(model["slots"]) for model in models) + 1
        except (NoAnswerError, *MALFORMED, KeyError, TypeError, AttributeError):
            return DEFAULT_CONCURRENCY  # another server

    async def ask(self, url: str, body: bytes) -> HttpAnswer:
        """Implement `Asker.ask`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._exchange, "POST", url, body, self._timeout_s
        )

    def _exchange(self, method: str, path: str, body: bytes | None, timeout_s: float) -> HttpAnswer:
        try:
            connection = self._kept() or self._connect()
            return self._on(connection, method, path, body, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            what = f"the connection broke: {type(error).__name__} {error}"
            raise NoAnswerError(what.rstrip(), was_sent=True) from error

    def _kept(self) -> http.client.HTTPConnection | None:
        """Take a connection that the server has not closed since its last answer."""
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                readable = select.poll()
                readable.register(connection.sock, select.POLLIN)
                if not readable.poll(0):  # only the end can arrive before a request
                    return connection
                connection.close()
        return None

    def _connect(self) -> http.client.HTTPConnection:
        place = self._host, self._port
        connection: http.client.HTTPConnection
        if self._tls is not None:
            connection = http.client.HTTPSConnection(*place, timeout=CONNECT_S, context=self._tls)
        else:
            connection = http.client.HTTPConnection(*place, timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise NoAnswerError(f"cannot connect: {error}", was_sent=False) from error
        _keep_alive(connection.sock)
        return connection

    def _on(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
    ) -> HttpAnswer:
        with self._lock:
            if self._is_closed:
                connection.close()
                raise ConnectionAbortedError("the batch was stopped")
            self._busy.add(connection)
        try:
            connection.sock.settimeout(timeout_s)
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES + 1)
            if len(data) > MAX_ANSWER_BYTES:
                raise http.client.HTTPException(
                    f"the answer has more than {MAX_ANSWER_BYTES >> 20} MiB"
                )
            if response.length:  # `read` with a size does not notice an early end
                raise http.client.IncompleteRead(data, response.length)
            headers = {name.lower(): value for name, value in response.getheaders()}
        except BaseException:
            connection.close()
            raise
        finally:
            with self._lock:
                self._busy.discard(connection)
        if response.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        return HttpAnswer(response.status, headers, data)

    async def close(self) -> None:
        """Implement `Asker.close`."""
        with self._lock:
            self._is_closed = True
            for connection in self._busy:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
            while self._idle:
                self._idle.pop().close()
        if self._executor is not None:
            await asyncio.to_thread(self._executor.shutdown)


def _no_url(url: str) -> ConfigError:
    return ConfigError(f"{url!r} is no address of a server; write http://127.0.0.1:8000")


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def refused_key(name: str, answer: HttpAnswer) -> ConfigError:
    """Make the error for a server that refuses the key."""
    return ConfigError(
        f"{name} answered {answer.status}: it does not take the key; give --api-key-file"
    )


class LocalAsker:
    """Bundles opened in this process, asked through the server's application, without a socket.

    Args:
        settings: the server's settings, with the bundles.
        priority: value of the header ``Priority``.
        concurrency: requests at once; None is one more than there are slots.
    """

    name = "the engine"

    def __init__(self, settings: ServerSettings, *, priority: str, concurrency: int | None) -> None:
        self._settings = settings
        self._priority = priority
        self._given = concurrency
        self.concurrency = concurrency or 1
        self._registry: ModelRegistry
        self._app: App
        self._beating: asyncio.Task[None] | None = None

    async def ready(self) -> HttpAnswer | None:
        """Implement `Asker.ready`."""
        try:
            from edge_serve.app import create_app
            from edge_serve.models.registry import ModelRegistry
            from edge_serve.observe.metrics import Metrics
            from edge_serve.run import open_llm
        except ModuleNotFoundError as error:
            if error.name in ("starlette", "uvicorn", "h11"):
                raise DependencyError(
                    f"a batch in this process needs {error.name}; run: {install_command('serve')}"
                ) from error
            raise
        settings = self._settings
        self._registry = ModelRegistry(
            open_llm(settings.engine),
            default=settings.default_model,
            stall_s=settings.stall_s,
            trusted_keys=settings.trusted_keys,
        )
        metrics = Metrics(self._registry.stats, engines=self._registry.engines)
        self._app = create_app(self._registry, settings, metrics, None)
        await asyncio.to_thread(self._registry.load, settings.model)
        if self._given is None:
            batches = (model.llm.scheduler.max_batch for model in self._registry.models())
            self.concurrency = sum(batches) + 1
        self._beating = asyncio.create_task(self._beat())
        return None

    async def _beat(self) -> None:
        while True:
            self._registry.beat()
            await asyncio.sleep(_BEAT_S)

    async def ask(self, url: str, body: bytes) -> HttpAnswer:
        """Implement `Asker.ask`."""
        answer = await self._exchange(url, body)
        if answer.status >= 500:
            self._registry.beat()
            if not self._registry.is_alive:
                raise BackendError(
                    f"the engine can serve no more ({self._registry.not_ready()}); the log has the "
                    "cause; run the same command again to go on"
                )
        return answer

    async def _exchange(self, url: str, body: bytes) -> HttpAnswer:
        status, headers, parts = 500, {}, []
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await asyncio.Event().wait()  # this client does not leave
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {
                    name.decode("latin-1").lower(): value.decode("latin-1")
                    for name, value in message["headers"]
                }
            else:
                parts.append(message.get("body", b""))

        sent = {
            b"content-type": b"application/json",
            b"content-length": str(len(body)).encode(),
            b"priority": self._priority.encode(),
        }
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": "POST",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(sent.items()),
            "client": None,
            "server": None,
        }
        await self._app(scope, receive, send)
        return HttpAnswer(status, headers, b"".join(parts))

    async def close(self) -> None:
        """Implement `Asker.close`."""
        if self._beating is not None:
            self._beating.cancel()
        if hasattr(self, "_registry"):
            # An engine that hangs must not keep the process.
            closing = threading.Thread(target=self._registry.close, daemon=True)
            closing.start()
            await asyncio.to_thread(closing.join, _CLOSE_S)
