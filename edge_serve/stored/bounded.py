"""Keeps stored responses within limits, wherever they are; in memory: `MemoryStore`."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from edge.errors import ResourceError

from .record import Record, UnusableError

_log = logging.getLogger("edge_serve")
_CLOCK_IS_SET_S = 1_704_067_200  # 2024: a device without a battery starts in 1970


class TooLargeError(ResourceError):
    """A response that alone exceeds the limits."""


@dataclass(frozen=True)
class Bounds:
    """Limits of a store; the oldest ended responses go first, from the client with the most.

    Attributes:
        responses: the most responses.
        num_bytes: the most bytes of all, without the rows of unfinished ones.
        client_responses: the most responses of one client; None sets no limit.
        client_bytes: the most bytes of one client; None sets no limit.
        rows_bytes: the most bytes of these rows; a response without them is computed again after a
            restart.
        age_s: seconds for which an ended response is kept; one made before the clock was set has no
            age.
    """

    responses: int = 1000
    num_bytes: int = 256 << 20
    client_responses: int | None = None
    client_bytes: int | None = None
    rows_bytes: int = 2 << 30
    age_s: float = 30 * 86400.0


IN_MEMORY = Bounds(
    responses=400, num_bytes=128 << 20, client_responses=100, client_bytes=32 << 20, rows_bytes=0
)
"""Limits of what is kept in memory: of one client, and of four."""


@dataclass(frozen=True)
class Entry:
    """The facts of a stored response that need no reading of it."""

    client: str
    created_at: int
    has_ended: bool
    num_bytes: int
    rows_bytes: int

    @classmethod
    def of(cls, record: Record, num_bytes: int) -> Entry:
        """Describe a record that takes this many bytes with its rows."""
        rows = None if record.unfinished is None else record.unfinished.rows
        rows_bytes = 0 if rows is None else rows.num_bytes
        ended = record.unfinished is None
        return cls(record.client, record.created_at, ended, num_bytes - rows_bytes, rows_bytes)


class BoundedStore(ABC):
    """Responses by their ids, within limits; any thread may call it.

    Args:
        bounds: limits of the store.
        clock: returns Unix seconds; by default those of the system.
    """

    def __init__(self, bounds: Bounds, clock: Callable[[], float] | None = None) -> None:
        self._bounds = bounds
        self._clock = clock or time.time
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}

    def close(self) -> None:
        """Let go of what only one server may have."""
        return

    def load(self, id_: str) -> Record | None:
        """Read a response; None if there is none with this id."""
        with self._lock:
            self._expire()
            if id_ not in self._entries:
                return None
            try:
                return self._read(id_)
            except (OSError, UnusableError) as error:
                _log.warning("response %s is left alone from now on: %s", id_, error)
                del self._entries[id_]
                return None

    def save(self, record: Record) -> None:
        """Keep a response in place of the one with its id.

        Raises:
            TooLargeError: it never fits.
            ResourceError: the disk is full, or unfinished responses fill the store.
        """
        with self._lock:
            self._expire()
            self._write(record)

    def delete(self, id_: str) -> None:
        """Remove a response, if it is there.

        Raises:
            ResourceError: it cannot be removed.
        """
        with self._lock:
            if id_ in self._entries:
                self._remove(id_)

    # ------------------------------------------------------------------ under the lock

    @abstractmethod
    def _read(self, id_: str) -> Record:
        """Read a response that has an entry."""

    @abstractmethod
    def _write(self, record: Record) -> None:
        """Make room for a response, write it, and enter it."""

    @abstractmethod
    def _remove(self, id_: str) -> None:
        """Remove a response and its entry."""

    def _make_room(self, record: Record, num_bytes: int) -> None:
        """Remove ended responses until one more fits.

        Raises:
            ResourceError: it never fits, or unfinished responses leave no room.
        """
        bounds = self._bounds
        others = {i: e for i, e in self._entries.items() if i != record.id}
        if bounds.client_responses is not None and bounds.client_bytes is not None:
            own = {i: e for i, e in others.items() if e.client == record.client}
            self._shrink(own, num_bytes, bounds.client_responses, bounds.client_bytes)
            others = {i: e for i, e in others.items() if i in self._entries}
        self._shrink(others, num_bytes, bounds.responses, bounds.num_bytes)

    def _shrink(self, among: dict[str, Entry], num_bytes: int, most: int, most_bytes: int) -> None:
        if num_bytes > most_bytes:
            raise TooLargeError(f"a response of {num_bytes} bytes exceeds the {most_bytes} allowed")
        while len(among) >= most or sum(e.num_bytes for e in among.values()) > (
            most_bytes - num_bytes
        ):
            ended = [i for i, e in among.items() if e.has_ended]
            if not ended:
                raise ResourceError(
                    f"{len(among)} stored responses have not ended and leave no room for another; "
                    "wait until some have, or cancel some"
                )
            held = Counter(e.client for e in among.values())
            oldest = min(ended, key=lambda i: (-held[among[i].client], among[i].created_at, i))
            self._remove(oldest)
            del among[oldest]

    def _expire(self) -> None:
        before = self._clock() - self._bounds.age_s
        for id_, entry in list(self._entries.items()):
            if entry.has_ended and _CLOCK_IS_SET_S <= entry.created_at < before:
                with contextlib.suppress(ResourceError):  # the next call tries again
                    self._remove(id_)


class MemoryStore(BoundedStore):
    """Responses that are gone when the server ends."""

    def __init__(
        self, bounds: Bounds = IN_MEMORY, clock: Callable[[], float] | None = None
    ) -> None:
        super().__init__(bounds, clock)
        self._data: dict[str, bytes] = {}

    def _read(self, id_: str) -> Record:
        record: Record = msgspec.json.decode(self._data[id_], type=Record)
        return record

    def _write(self, record: Record) -> None:
        data = msgspec.json.encode(record)
        self._make_room(record, len(data))
        self._data[record.id] = data
        self._entries[record.id] = Entry.of(record, len(data))

    def _remove(self, id_: str) -> None:
        del self._data[id_], self._entries[id_]
