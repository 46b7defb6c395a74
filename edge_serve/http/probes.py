"""Answers `/health` and `/ready` on a port and in a thread of their own.

In a storm of clients the event loop answers a probe after all earlier requests, and a load balancer
or a kubelet takes the server for dead. So nothing here waits for the event loop: the loop publishes
its state a few times a second, and probes are answered with the last published state. If nothing
was published for `LOOP_STALL_S`, the answer is that the loop hangs.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping

import h11
import msgspec

from edge.errors import ResourceError

from .connections import Listener
from .errors import APIError

HEALTHY = {"status": "ok"}
"""The answer of `/health`."""
LOOP_STALL_S = 10.0
"""Silence after which the event loop counts as hung."""
_HEAD_S = 2.0
_LOOK_S = 0.5
_MOST_WAITING = 64  # connections whose head is incomplete; beyond these the oldest is closed
_READ_BYTES = 8 * 2**10
Ready = Mapping[str, object] | APIError


class Probes:
    """A listener that answers probes, one connection each.

    Args:
        sock: listening socket; it is closed at the end.
        check_host: refuses a request by its header ``Host``, None if it has none.
        ready: answer of `/ready` until something else is published.
        clock: returns monotonic seconds.

    Attributes:
        port: the TCP port.
    """

    def __init__(
        self,
        sock: Listener,
        check_host: Callable[[bytes | None], None],
        ready: Ready,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listener = sock
        self._listener.setblocking(False)
        self._check_host = check_host
        self._clock = clock
        self._published = (clock(), ready)
        self._waiting: dict[socket.socket, tuple[float, h11.Connection]] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="edge-probes", daemon=True)
        self.port: int = sock.getsockname()[1]

    def publish(self, ready: Ready) -> None:
        """Set the answer of `/ready`, and show that the event loop is alive."""
        self._published = (self._clock(), ready)

    def start(self) -> None:
        """Start the thread that answers.

        Raises:
            ResourceError: no thread could be started.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourceError(
                f"the thread for probes could not be started ({error}); free memory or raise the "
                "limit of processes (ulimit -u)"
            ) from error

    def close(self) -> None:
        """End the thread, if it runs, and close the listener."""
        self._waker.close()
        if self._thread.is_alive():
            self._thread.join()
        for sock in (self._listener, self._woken, *self._waiting):
            sock.close()
        self._selector.close()

    def answer(self, path: str, host: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """Answer a GET as the main port does, as far as possible: status, headers, body."""
        try:
            return 200, _PLAIN, msgspec.json.encode(self._find(path, host))
        except APIError as error:
            return error.status, error.headers(), error.body()

    def _find(self, path: str, host: bytes | None) -> object:
        self._check_host(host)
        if path not in ("/health", "/ready"):
            raise APIError(404, "not_found", "this port answers /health and /ready only")
        at, ready = self._published
        silent_s = self._clock() - at
        if silent_s > LOOP_STALL_S:
            raise APIError(
                503,
                "loop_stalled",
                f"the server has answered nobody for {silent_s:.0f} s; its log may have the cause",
                retry_after_s=5,
            )
        if path == "/health":
            return HEALTHY
        if isinstance(ready, APIError):
            raise ready.with_traceback(None)  # else the traceback would grow with each probe
        return ready

    # ------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        for sock in (self._listener, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select(_LOOK_S if self._waiting else None):
                ready = key.fileobj
                if ready is self._woken:
                    return
                if ready is self._listener:
                    self._accept()
                elif isinstance(ready, socket.socket) and ready in self._waiting:
                    self._serve(ready)  # unless it was just closed to make room for another
            for sock, (since, _) in list(self._waiting.items()):
                if self._clock() - since > _HEAD_S:
                    self._drop(sock)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has left, or there is no descriptor for it
            sock = self._listener.accept()[0]
            sock.setblocking(False)
            self._waiting[sock] = (self._clock(), h11.Connection(h11.SERVER))
            if self._serve(sock):  # most heads have arrived by now
                return
            self._selector.register(sock, selectors.EVENT_READ)
            if len(self._waiting) > _MOST_WAITING:
                self._drop(next(iter(self._waiting)))

    def _serve(self, sock: socket.socket) -> bool:
        """Read what has arrived; once the head is whole, answer, close and return True."""
        _, connection = self._waiting[sock]
        try:
            connection.receive_data(sock.recv(_READ_BYTES))
            event = connection.next_event()
            if event is h11.NEED_DATA:
                return False
            if isinstance(event, h11.Request):
                sock.sendall(self._written(connection, event))  # it fits into an empty buffer
        except BlockingIOError:
            return False
        except (OSError, h11.ProtocolError):  # not a probe
            pass
        self._drop(sock)
        return True

    def _written(self, connection: h11.Connection, request: h11.Request) -> bytes:
        fields = dict(reversed(request.headers))  # the first of each name counts
        if request.method in (b"GET", b"HEAD"):
            path = request.target.partition(b"?")[0].decode("ascii")
            status, headers, body = self.answer(path, fields.get(b"host"))
        else:
            error = APIError(405, "method_not_allowed", "this path takes GET only", allow="GET")
            status, headers, body = error.status, error.headers(), error.body()
        sent = {**headers, "content-length": str(len(body)), "connection": "close"}
        events = [h11.Response(status_code=status, headers=list(sent.items()))]
        if request.method != b"HEAD":
            events.append(h11.Data(data=body))
        return b"".join(connection.send(event) or b"" for event in (*events, h11.EndOfMessage()))

    def _drop(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # it was answered at once
            self._selector.unregister(sock)
        del self._waiting[sock]
        sock.close()


_PLAIN = {"content-type": "application/json", "cache-control": "no-store"}
