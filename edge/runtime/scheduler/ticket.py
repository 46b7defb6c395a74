"""`Ticket`: the caller's end of one running sequence, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue

from edge.errors import EdgeError, RequestError

from .request import Request, TokenEvent

_MOST_UNREAD = 1 << 16  # an answer that slides has no end of its own


class Channel:
    """Carries events from the engine's thread to one reader; never blocks the writer."""

    def __init__(self) -> None:
        self._items: SimpleQueue[TokenEvent | EdgeError] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, item: TokenEvent | EdgeError) -> None:
        """Add an item and wake the reader; called in the engine's thread.

        Raises:
            RequestError: nobody reads; what ends the sequence is taken all the same.
        """
        last = isinstance(item, EdgeError) or item.finish_reason is not None
        if not last and self._items.qsize() >= _MOST_UNREAD:
            raise RequestError(
                f"{_MOST_UNREAD} tokens of the answer wait to be read, so it was ended; read it as "
                "it comes, or set max_tokens"
            )
        self._items.put(item)
        if self._waiter is None:  # a reader that is about to wait looks again first
            return
        with self._lock:
            loop, future = self._waiter
            self._waiter = None
        try:
            loop.call_soon_threadsafe(_wake, future)
        except RuntimeError:
            # The reader's loop was closed under it: nobody will read on.
            if not loop.is_closed():
                raise

    def get(self) -> TokenEvent | EdgeError:
        """Wait for the next item."""
        return self._items.get()

    async def get_async(self) -> TokenEvent | EdgeError:
        """Wait for the next item without holding up the loop."""
        while True:
            try:
                return self._items.get_nowait()
            except Empty:
                pass
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._waiter = (loop, future)
            # An item may have come before the writer could see that somebody waits.
            if self._items.empty():
                await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # the waiting task was cancelled
        future.set_result(None)


class Ticket:
    """One sequence. Iterate over it once, from a thread or from asyncio.

    A ticket that is dropped before its end is cancelled.

    Attributes:
        request: what was asked for.
        prompt_tokens: tokens of its prompt.
        seed: of its random numbers, also where the request left it open.
    """

    def __init__(
        self, request: Request, seed: int, channel: Channel, cancel: Callable[[], None]
    ) -> None:
        self.request = request
        self.seed = seed
        self._channel = channel
        self._cancel = cancel
        self._ended = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.ids)

    def cancel(self) -> None:
        """End the sequence within one step; its last event has the reason ``cancelled``."""
        self._cancel()

    def __iter__(self) -> Iterator[TokenEvent]:
        """Wait for each token in turn.

        Raises:
            DeadlineError: the request took longer than it may.
            BackendError: the engine failed.
        """
        while not self._ended:
            yield self._take(self._channel.get())

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Like iteration, from any running loop."""
        while not self._ended:
            yield self._take(await self._channel.get_async())

    def _take(self, item: TokenEvent | EdgeError) -> TokenEvent:
        if isinstance(item, EdgeError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    def __del__(self) -> None:
        # Not there if the constructor failed.
        if not self.__dict__.get("_ended", True):
            self._cancel()
