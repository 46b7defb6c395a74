"""Runs slow work in threads, beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

from edge.errors import OverloadError, ResourceError

from .errors import APIError

if TYPE_CHECKING:
    from edge_serve.settings import ServerSettings

_Result = TypeVar("_Result")
OnPiece = Callable[[], None]

LARGE_BYTES = 32 * 2**10
"""Size from which on bodies are read and encoded apart from shorter ones, one after the other."""
_SHORT_THREADS = 2


class ClientGoneError(ConnectionError):
    """The client left before its answer was complete."""


class _GivenUpError(Exception):
    """Nobody waits for this work any more."""


def check_there(receive: Callable[[], Awaitable[Any]]) -> None:
    """Check that the client is still there, before slow work is done for it.

    Args:
        receive: reads from the client's connection. The guard's has the attribute ``has_left``,
            which knows before the event loop does; one without it belongs to no connection.

    Raises:
        ClientGoneError: the client has left.
    """
    if getattr(receive, "has_left", False):
        raise ClientGoneError("the client left")


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(
    work: Coroutine[Any, Any, _Result], receive: Callable[[], Awaitable[Any]] | None
) -> _Result:
    """Wait for ``work``, and cancel it if the client leaves.

    Args:
        work: coroutine to wait for.
        receive: reads from the client's connection, whose body has been read; None if there is no
            client.

    Raises:
        ClientGoneError: the client left.
        Whatever ``work`` raises.
    """
    if receive is None:
        return await work
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGoneError("the client left")
        return job.result()
    finally:
        gone.cancel()
        job.cancel()
        del job  # an error's traceback leads here


@contextlib.contextmanager
def _submitting(todo: list[Any]) -> Iterator[None]:
    """Empty ``todo`` if its job cannot be submitted, because the executor has queued it anyway.

    Raises:
        ResourceError: no thread could be started for it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        todo.clear()
        raise ResourceError(
            f"a thread could not be started ({error}); free memory or raise the limit of "
            "processes (ulimit -u)"
        ) from error


async def in_thread(work: Callable[[], _Result]) -> _Result:
    """Run ``work`` in a thread and wait for its result.

    Raises:
        ResourceError: no thread could be started.
        Whatever ``work`` raises.
    """
    todo = [work]
    del work
    with _submitting(todo):
        job = asyncio.get_running_loop().run_in_executor(None, lambda: todo.pop()())
    return await job


def in_daemon(work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """Run ``work``, which may take long, in a thread that does not keep the process from exiting.

    Raises:
        RuntimeError: no thread could be started.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(result: _Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(cast("_Result", result))
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # noqa: BLE001 - raised again where it is awaited
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="edge-service", daemon=True).start()
    return future


class Lane:
    """A few threads with a bounded queue, for work that may take seconds.

    Args:
        name: prefix of the threads' names.
        full: message for too many waiting jobs.
        late: message for a job that did not end in time.
        num_threads: number of jobs that run at once.
        queue_capacity: the most jobs that wait.
        timeout_s: seconds that a job may take, its wait included; None sets no limit.
        on_idle: called in the event loop when the last job has ended.
    """

    def __init__(
        self,
        name: str,
        *,
        full: str,
        late: str,
        num_threads: int = 1,
        queue_capacity: int,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._full = full
        self._late = late
        self._capacity = num_threads + queue_capacity
        self._timeout_s = timeout_s
        self._on_idle = on_idle
        self.num_jobs = 0

    async def run(
        self,
        work: Callable[[OnPiece], _Result],
        receive: Callable[[], Awaitable[Any]],
        *,
        timeout_s: float | None = None,
        ended: asyncio.Future[None] | None = None,
    ) -> _Result:
        """Run ``work`` and return its result; it ends early if the client leaves or time is up.

        Args:
            work: function to run; it calls its argument often, which raises to end it.
            receive: reads from the client's connection, whose body has been read.
            timeout_s: seconds that this job may take; None is the lane's own limit.
            ended: future that fails when there is nothing left to wait for.

        Raises:
            OverloadError: too many jobs wait.
            ResourceError: no thread could be started.
            APIError: 504, it took too long.
            ClientGoneError: the client left.
            Whatever ``ended`` fails with.
        """
        check_there(receive)
        if self.num_jobs >= self._capacity:
            raise OverloadError(f"{self._full}; try again later", 1.0)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        left = threading.Event()
        deadline = None if limit_s is None else time.monotonic() + limit_s
        todo = [work]
        del work

        def on_piece() -> None:
            if left.is_set() or (deadline is not None and time.monotonic() > deadline):
                raise _GivenUpError

        def guarded() -> _Result:
            on_piece()  # it may have waited for this thread
            try:
                taken = todo.pop()
            except IndexError:  # it was just given up
                raise _GivenUpError from None
            return taken(on_piece)

        loop = asyncio.get_running_loop()
        with _submitting(todo):
            submitted = self._executor.submit(guarded)
        self.num_jobs += 1
        submitted.add_done_callback(lambda _: self._call_soon(loop, self._ended))
        job = asyncio.wrap_future(submitted)
        job.add_done_callback(lambda job: job.cancelled() or job.exception())
        gone = asyncio.ensure_future(until_gone(receive))
        waiting: set[asyncio.Future[Any]] = {job, gone} if ended is None else {job, gone, ended}
        try:
            await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if ended is not None and ended.done():
                ended.result()
            if job.done():
                return job.result()
            if gone.done():
                raise ClientGoneError("the client left")
            raise self._too_late(limit_s)
        except _GivenUpError:  # the thread noticed before this loop that time is up
            raise self._too_late(limit_s) from None
        finally:
            left.set()
            todo.clear()  # a cancelled job stays in the executor's queue until its turn
            gone.cancel()
            job.cancel()  # a thread that has begun runs until its next piece
            # An error's traceback leads to this frame: it would keep itself, and the request, until
            # a garbage collection.
            del submitted, job, waiting

    def _too_late(self, limit_s: float | None) -> APIError:
        return APIError(
            504,
            "deadline_exceeded",
            f"{self._late} within {limit_s:.3g} s; ask for less, or try again later",
            retry_after_s=5,
            should_retry=False,
        )

    @staticmethod
    def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and so has its server
            loop.call_soon_threadsafe(call)

    def _ended(self) -> None:
        self.num_jobs -= 1
        if not self.num_jobs:
            self._on_idle()


class Lanes:
    """The lanes of a server, one for each kind of work, so that none waits for a longer one.

    Args:
        settings: lengths of the queues, and time limits.
        on_large: called in the event loop when the last of some long requests has been encoded.

    Attributes:
        forms: compiles the forms of answers, one at a time, as each may take a process of its own.
    """

    def __init__(
        self, settings: ServerSettings, *, on_large: Callable[[], None] = lambda: None
    ) -> None:
        self._short = Lane(
            "edge-text",
            full="too many texts wait to be encoded",
            late="the text was not encoded",
            num_threads=_SHORT_THREADS,
            queue_capacity=settings.max_connections,  # each takes milliseconds
            timeout_s=settings.text_timeout_s,
        )
        # One at a time: a text briefly takes up to 200 times its length in memory.
        self._long = Lane(
            "edge-long-text",
            full="too many texts wait to be encoded",
            late="the text was not encoded",
            queue_capacity=settings.text_queue_capacity,
            timeout_s=settings.text_timeout_s,
            on_idle=on_large,
        )
        self.forms = Lane(
            "edge-grammar",
            full="too many forms wait to be compiled",
            late="the form was not compiled",
            queue_capacity=settings.queue_capacity,
        )

    def lane(self, num_bytes: int) -> Lane:
        """Return the lane for a request with a body of this size."""
        return self._short if num_bytes < LARGE_BYTES else self._long
