"""Limits open connections and file descriptors; closes those that wait longest for a client."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from edge.errors import ConfigError

_log = logging.getLogger("edge_serve")
SURPLUS = 32
"""Connections accepted beyond the limits, to answer health probes."""
_MOST_FILES = 65_536
_RESERVED_FILES = 64  # for everything but connections that the process opens while it serves
_FILES_PER_MODEL = 32  # files and maps of a bundle, and its engine's
_LEAST_CONNECTIONS = 8
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG_EVERY_S = 10.0
_MOST_GONE = 256  # clients that had left when they were accepted, closed in one go
_LEFT = (7, 8)  # TCP_CLOSE: reset by the client; TCP_CLOSE_WAIT: closed by it (net/tcp_states.h)
# Linux keeps up to twice this for one client. Its default of 4 MB (tcp_wmem) would make
# `stream_buffer_bytes` meaningless.
_SEND_BUFFER_BYTES = 128 * 2**10


class Connection(Protocol):
    """The methods of a connection that `Connections` uses.

    Attributes:
        group: the client's address, as limits count it.
        is_surplus: whether it is beyond the limits, so that only health probes are answered.
    """

    group: str
    is_surplus: bool

    @property
    def waits_for_client(self) -> bool:
        """Whether the server waits for the client to send or read something."""
        ...

    def abort(self) -> None:
        """Close it at once."""
        ...


class Connections:
    """The open connections of a server, by address; the latest active ones are at the end.

    Args:
        max_connections: the most connections in all.
        max_per_address: the most connections of one address.
    """

    def __init__(self, max_connections: int, max_per_address: int) -> None:
        self._max = max_connections
        self._max_per_address = max_per_address
        self._groups: dict[str, OrderedDict[Connection, None]] = {}
        self._num_surplus = 0
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def add(self, connection: Connection) -> None:
        """Count a new connection; if there is no room for it, close another, or this one.

        If all others are being answered, it is kept as surplus beyond the limit.
        """
        group = self._groups.get(connection.group, OrderedDict())
        if len(group) >= self._max_per_address:
            found = self._idlest(group)
        elif self._total - self._num_surplus >= self._max:
            found = self._idlest_of_all()
        else:
            self._put(connection, is_surplus=False)
            return
        if found is not None:
            self._close(found)
            self._put(connection, is_surplus=False)
        else:
            self._add_surplus(connection)

    def _add_surplus(self, connection: Connection) -> None:
        if self._num_surplus >= SURPLUS:
            everyone = (c for group in self._groups.values() for c in group)
            found = next((c for c in everyone if c.is_surplus and c.waits_for_client), None)
            if found is None:
                connection.abort()
                return
            self._close(found)
        self._put(connection, is_surplus=True)

    def touch(self, connection: Connection) -> None:
        """Note that a connection was active just now."""
        group = self._groups.get(connection.group)
        if group is not None and connection in group:
            group.move_to_end(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed; a second call does nothing."""
        group = self._groups.get(connection.group)
        if group is None or connection not in group:
            return
        del group[connection]
        if not group:
            del self._groups[connection.group]
        self._total -= 1
        self._num_surplus -= connection.is_surplus

    def close_idlest(self) -> None:
        """Close the connection that has waited longest for its client, if one does."""
        found = self._idlest_of_all()
        if found is not None:
            self._close(found)

    def _put(self, connection: Connection, *, is_surplus: bool) -> None:
        connection.is_surplus = is_surplus
        self._groups.setdefault(connection.group, OrderedDict())[connection] = None
        self._total += 1
        self._num_surplus += is_surplus

    def _close(self, connection: Connection) -> None:
        self.remove(connection)
        connection.abort()

    def _idlest_of_all(self) -> Connection | None:
        """Find one of the address with the most connections; a client with one keeps it."""
        for group in sorted(self._groups.values(), key=len, reverse=True):
            found = self._idlest(group)
            if found is not None:
                return found
        return None

    def _idlest(self, group: OrderedDict[Connection, None]) -> Connection | None:
        return next((c for c in group if c.waits_for_client and not c.is_surplus), None)


class Socket(Protocol):
    """The method of a socket that `has_left` uses; transports of asyncio and uvloop have it."""

    def getsockopt(self, level: int, name: int, length: int, /) -> bytes:
        """Return an option of the socket, as `socket.socket.getsockopt` does."""
        ...


def has_left(sock: Socket) -> bool:
    """Whether the client has closed its connection, even if not all it sent has been read.

    asyncio says so only after it has read everything, one or more passes of the event loop later.
    """
    try:
        # Its first byte is the state. Unlike poll, this does not let another thread have the GIL.
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _LEFT
    except OSError:  # closed on this side
        return True


class Listener(socket.socket):
    """A listening socket that survives a lack of file descriptors, and clients that left at once.

    asyncio logs a traceback for each connection that it cannot accept, and tries again at once.
    This socket uses a spare descriptor to accept and close them, and logs a line now and then.
    A client that has left before it is accepted is closed at once, in a tenth of the time that
    asyncio takes to find that out. One that may have sent a GET is answered, since some programs
    close their side of the connection when they have sent a request.

    Attributes:
        on_lack: called when a connection had to be refused.
    """

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        self.on_lack: Callable[[], None] = lambda: None
        self._spare = _open_spare()
        self._refused = 0
        self._said = -_LOG_EVERY_S

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: there is none, it was refused for lack of a descriptor, or `_MOST_GONE`
                clients in a row have left.
        """
        for _ in range(_MOST_GONE):
            found = self._accept_any()
            if not (has_left(found[0]) and _asks_nothing(found[0])):
                return found
            found[0].close()
        raise BlockingIOError(errno.EAGAIN, "others have their turn")

    def _accept_any(self) -> tuple[socket.socket, Any]:
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR:
                raise
            self._refuse()
            raise BlockingIOError(errno.EAGAIN, "refused for lack of a file descriptor") from error

    def close(self) -> None:
        """Close the socket and give the spare descriptor back."""
        self._free_spare()
        super().close()

    def _refuse(self) -> None:
        had_spare = self._free_spare()
        refused = None
        with contextlib.suppress(OSError):
            refused = super().accept()[0]
        if refused is not None:
            refused.close()
        elif not had_spare:
            time.sleep(0.01)  # nothing can be done until something is closed; do not spin
        self._spare = _open_spare()
        self._refused += 1
        self.on_lack()
        now = time.monotonic()
        if now - self._said >= _LOG_EVERY_S:
            _log.error(
                "no file descriptor is left; refused %d connections; raise the limit of open files "
                "(LimitNOFILE=, ulimit -n) or lower --max-connections",
                self._refused,
            )
            self._said, self._refused = now, 0

    def _free_spare(self) -> bool:
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)
        return spare is not None


def _asks_nothing(sock: socket.socket) -> bool:
    """Whether a client that has closed its side has not sent the beginning of a GET."""
    try:
        return sock.recv(4, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b"GET "
    except OSError:  # reset
        return True


def listen(host: str, port: int, option: str = "--port") -> Listener:
    """Open a listening socket.

    Args:
        host: address to bind.
        port: port to bind; 0 takes a free one.
        option: name of the option that sets the port, for the error.

    Raises:
        ConfigError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle only if the protocol is named; else answers wait 40 ms for an ACK.
    sock = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        # A bare name would lose the interface of fe80::1%eth0.
        found = socket.getaddrinfo(
            host.strip("[]") or None, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sock.bind(found[0][4])
        sock.listen()  # a small model is ready, and systemd knows it, before uvicorn gets to it
        sock.set_inheritable(False)
    except OSError as error:
        sock.close()
        at_fault = option if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another {at_fault}"
        ) from error
    return sock


def _open_spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def raise_file_limit() -> None:
    """Raise this process's soft limit of open files to the hard one, 65,536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it; then it stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def possible_connections(wanted: int, num_models: int) -> int:
    """Return how many of these connections the limit of open files allows.

    Files that are open now count, and those that models and the service will open are reserved.

    Args:
        wanted: the setting ``max_connections``.
        num_models: number of models still to be opened.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    try:
        num_open = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        num_open = _RESERVED_FILES
    reserved = num_open + _RESERVED_FILES + SURPLUS + _FILES_PER_MODEL * num_models
    possible = max(soft - reserved, _LEAST_CONNECTIONS)
    if possible < wanted:
        _log.warning(
            "at most %d connections instead of %d: the limit of open files is %d; raise it "
            "(LimitNOFILE=, ulimit -n)",
            possible,
            wanted,
            soft,
        )
    return min(wanted, possible)
