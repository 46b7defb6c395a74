"""Hands parts of a work out to workers, and gives back their results in the order of the parts."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from edge.errors import DeadlineError, EdgeError

from .members import LostError

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
_TRIES = 2
"""Workers that a part may take down with it; a third is not risked."""
_PATIENCE = 3.0
"""How many times as long as the longest part so far a part may take before another worker that has
nothing to do does it, too: its own may hang, which nobody can tell from work."""


def fan_out(
    parts: Sequence[_Part],
    workers: Mapping[str, Callable[[_Part], _Result]],
    *,
    ahead: int,
    lost: Callable[[str, LostError], None],
    done: Callable[[_Part], None] = lambda part: None,
    late: Callable[[str, str], None] = lambda name, other: None,
    patience_s: float = 10.0,
) -> Iterator[_Result]:
    """Run every part on one of the workers, each of which does one at a time.

    A worker that is lost gets nothing more, and its part is done again by another one, once. A part
    that takes very long is done by another one, too, as soon as one has nothing else to do. Of
    each part one result is given back, the first.

    Args:
        parts: what is to be done.
        workers: what does a part, by name; they are called in threads of their own and raise
            `LostError` where they cannot be reached any more.
        ahead: parts that may be begun or done before the one whose result comes next: bounds the
            results that wait for their turn.
        lost: is told of each worker that is lost, and why.
        done: is told of each part that was done, in the order of time.
        late: is told of each worker that is late with a part, and of the one that does it, too.
        patience_s: no part is late before.

    Yields:
        The result of each part, in the order of ``parts``.

    Raises:
        DeadlineError: no worker is left, or a part was lost with two of them.
        EdgeError: a worker raised it; the message names the worker.
    """
    work = _Work(parts, workers, ahead, lost, done, late, patience_s)
    for name in workers:
        # A worker may be in a call that nobody can break off; the process must end all the same.
        threading.Thread(target=work.run, args=(name,), name=f"part of {name}", daemon=True).start()
    try:
        for index in range(len(parts)):
            yield work.take(index)
    finally:
        work.stop()


class _Work(Generic[_Part, _Result]):
    """See `fan_out`; every attribute is guarded by the condition."""

    def __init__(
        self,
        parts: Sequence[_Part],
        workers: Mapping[str, Callable[[_Part], _Result]],
        ahead: int,
        lost: Callable[[str, LostError], None],
        done: Callable[[_Part], None],
        late: Callable[[str, str], None],
        patience_s: float,
    ) -> None:
        self._parts, self._workers, self._ahead = parts, workers, ahead
        self._patience_s = patience_s
        self._lost, self._done, self._late = lost, done, late
        self._changed = threading.Condition()
        self._waiting = list(range(len(parts)))  # sorted, so it is a heap
        self._running: dict[int, dict[str, float]] = {}  # since when, by worker
        self._longest_s: float | None = None
        self._results: dict[int, _Result] = {}
        self._finished: set[int] = set()
        self._losers: dict[int, list[str]] = {}
        self._alive = set(workers)
        self._next = 0
        self._error: Exception | None = None
        self._stopped = False

    def take(self, index: int) -> _Result:
        """Wait for the result of a part, and let later ones begin."""
        with self._changed:
            self._next = index
            self._changed.notify_all()
            while index not in self._results and self._error is None and self._alive:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            if index not in self._results:
                left = len(self._parts) - index
                raise DeadlineError(
                    f"all devices were lost; {left} of {len(self._parts)} parts are not done; look "
                    "at edge-llm fleet status, and start again"
                )
            return self._results.pop(index)

    def stop(self) -> None:
        """Let nobody begin anything more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self, name: str) -> None:
        """Do parts until none is left, or the worker is lost."""
        while (index := self._begin(name)) is not None:
            try:
                self._keep(name, index, self._workers[name](self._parts[index]))
            except LostError as error:
                self._give_up(name, index, error)
                return
            except Exception as error:  # noqa: BLE001 - `take` raises it
                with self._changed:
                    self._error = self._error or renamed(error, f"{name}: {error}")
                    self._changed.notify_all()
                return

    def _keep(self, name: str, index: int, result: _Result) -> None:
        with self._changed:
            took_s = time.monotonic() - self._running[index].pop(name)
            self._longest_s = max(took_s, self._longest_s or 0.0)
            if index in self._finished:
                return
            self._finished.add(index)
            if not self._stopped:
                self._done(self._parts[index])
            self._results[index] = result
            self._changed.notify_all()

    def _begin(self, name: str) -> int | None:
        with self._changed:
            while not self._stopped and self._error is None:
                index, wait_s = self._find(name)
                if index is not None:
                    self._running.setdefault(index, {})[name] = time.monotonic()
                    return index
                self._changed.wait(wait_s)  # a part of another worker may come back
            return None

    def _find(self, name: str) -> tuple[int | None, float | None]:
        """A part for a worker, or how long to wait until another one may be late with one."""
        if self._waiting and self._waiting[0] < self._next + self._ahead:
            return heapq.heappop(self._waiting), None
        alone = {
            index: next(iter(workers.items()))
            for index, workers in self._running.items()
            if len(workers) == 1 and name not in workers and index not in self._finished
        }
        if self._longest_s is None or not alone:
            return None, None
        oldest = min(alone, key=lambda index: alone[index][1])
        worker, since = alone[oldest]
        left_s = max(self._patience_s, _PATIENCE * self._longest_s) - (time.monotonic() - since)
        if left_s > 0:
            return None, left_s
        self._late(worker, name)
        return oldest, None

    def _give_up(self, name: str, index: int, error: LostError) -> None:
        with self._changed:
            self._alive.discard(name)
            del self._running[index][name]
            if self._stopped:
                return
            losers = self._losers.setdefault(index, [])
            losers.append(name)
            if len(losers) >= _TRIES and index not in self._finished:
                self._error = DeadlineError(
                    f"{' and then '.join(losers)} were lost with the same part ({index + 1} of "
                    f"{len(self._parts)}): {error}; it is not tried on a third device; is their "
                    "memory too small?"
                )
            elif not self._running[index] and index not in self._finished:
                heapq.heappush(self._waiting, index)
            self._changed.notify_all()
            self._lost(name, error)


def renamed(error: Exception, message: str) -> Exception:
    """Return the same error with a message that says where; one that is made of more stays."""
    if not isinstance(error, EdgeError):
        return error
    try:
        found = type(error)(message)
    except TypeError:  # such as a prompt that is too long, wherever it is read
        return error
    found.__cause__ = error
    return found
