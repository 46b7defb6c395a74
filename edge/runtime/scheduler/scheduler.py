"""Defines `Scheduler`, which gives `EngineCore` a thread and lets callers use it from any other.

Only that thread touches the backend. It starts with the first request, sleeps while there is
nothing to do, and ends with `Scheduler.close` or when the scheduler is garbage-collected.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np

from edge.backends import Backend
from edge.bundle.embeddings import EmbeddingTable
from edge.engine_config import EngineConfig
from edge.errors import BackendError, ContextLengthError, OverloadError, RequestError, ResourceError

from .core import EngineCore
from .request import Overflow, PrefixSource, Request, SchedulerStats, Sink, SlotState, Suspended
from .sequence import SequenceState

if TYPE_CHECKING:
    from .drafter import Drafter

_Result = TypeVar("_Result")
_Job: TypeAlias = tuple[Future[object], Callable[[EngineCore], object]]
_log = logging.getLogger(__name__)
_FIRST_RETRY_S = 1.0  # told to a refused caller before anything has finished
_FORKED = (
    "this process was forked from the one that loaded the bundle, and engines do not survive that; "
    "load the bundle in this process"
)


class Scheduler:
    """Runs many requests at once on the slots of one backend; safe to use from any thread.

    Args:
        backend: the engine; from now on others may use it only through `call`.
        embeddings: its token table.
        vocab_size: length of a row of logits.
        config: how many sequences run at once and wait, how long a step may be, and what is kept.
            Slots beyond ``max_batch`` hold prefixes. Without ``reuse_prefix`` only the samples of
            one submission share their prompt.
        overflow: makes room when a slot is full; None ends the sequence with ``length``.
        drafter: guesses tokens of all sequences; None runs without speculation.
        prefix_store: prefixes that are kept outside the cache.
        pools: whether sequences end with their prompt, and sinks are `RowSink`.
    """

    def __init__(
        self,
        backend: Backend,
        embeddings: EmbeddingTable,
        vocab_size: int,
        config: EngineConfig,
        *,
        overflow: Overflow | None = None,
        drafter: Drafter | None = None,
        prefix_store: PrefixSource | None = None,
        pools: bool = False,
    ) -> None:
        core: type[EngineCore] = EngineCore
        if pools:
            from .pooling import PoolingCore

            core = PoolingCore
        elif embeddings.has_pictures:
            from .picturing import PictureCore

            core = PictureCore
        self._core = core(
            backend,
            embeddings,
            vocab_size,
            config,
            overflow=overflow,
            drafter=drafter,
            prefix_store=prefix_store,
        )
        self.queue_capacity = config.queue_capacity
        self._thread = _EngineThread(self._core)
        self._submissions = itertools.count(1)
        weakref.finalize(self, self._thread.signal_close)

    @property
    def max_batch(self) -> int:
        """Return the number of sequences that run at once."""
        return self._core.policy.max_batch

    @property
    def drafting(self) -> bool:
        """Whether the drafter is used; may be set at any time, to compare."""
        return self._core.drafting is not None and self._core.drafting.enabled

    @drafting.setter
    def drafting(self, value: bool) -> None:
        if self._core.drafting is not None:
            self._core.drafting.enabled = value

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[SequenceState]:
        """Queue requests that belong together: all of them or none.

        The engine's thread ends with this scheduler, so a reader of a sink must keep the scheduler.

        Args:
            requests: one per sequence; `Request.sample` makes several from one.
            sinks: for each request, the sink of its tokens.

        Returns:
            The sequences, in order; set ``cancelled`` to end one within a step.

        Raises:
            OverloadError: the scheduler drains, or the queue is full and no other client has more
                in it. If another client has, the newest waiting requests of the one with most end
                with this error instead.
            RequestError: a prompt is empty, an id is outside the vocabulary, there are no or too
                many requests, or a sink or constraint is given twice.
            ContextLengthError: the prompt does not fit into a slot.
            BackendError: the backend cannot run any more, or the scheduler is closed.
        """
        self.check_count(len(requests))
        for request in requests:
            self._check(request)
        constraints = [r.constraint for r in requests if r.constraint is not None]
        if any(len(set(map(id, given))) < len(given) for given in (constraints, sinks)):
            raise RequestError("a constraint or sink follows one sequence; give each its own")
        # Without reuse, only requests that are submitted together share rows.
        number = next(self._submissions)
        group = "" if self._core.roster.reuse_prefix else f"\0{number}"
        now = self._core.now()
        sequences = []
        for request, sink in zip(requests, sinks, strict=True):
            sequences.append(self._core.sequence(request, sink, request.salt + group, now))
            sequences[-1].submission = number
        self._thread.take_in(sequences, self.max_batch + self.queue_capacity)
        return sequences

    def call(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` in the engine's thread while no sequence runs, and wait for it.

        ``work`` may use the backend freely; cached prefixes are dropped. Running sequences finish
        first. When it ends, as many waiting sequences as run at once come before the next call.
        ``work`` must report its steps with `report_step`; otherwise the engine seems to hang. A
        call made within ``work`` runs at once.

        Raises:
            BackendError: the scheduler is closed.
            Exception: any error of ``work``.
        """
        return cast(_Result, self._thread.call(work).result())

    def suspend(
        self, sequences: Sequence[SequenceState], timeout_s: float
    ) -> list[Suspended | None]:
        """Take sequences out, so that they can continue later with the same tokens in any process.

        It happens between two rounds, whether they run, wait or are preempted. Their sinks get the
        tokens sampled so far and the end ``cancelled``. To continue one, submit its request again
        with `Request.resume_from`; its deadline and times begin anew.

        Args:
            sequences: sequences from `submit`.
            timeout_s: seconds to wait for the current round.

        Returns:
            For each sequence, in order, the state from which it continues; None if it has ended.

        Raises:
            BackendError: the scheduler is closed, the engine failed, or it ended no round in time.
        """
        work = self._thread.between(lambda core: [core.suspend(each) for each in sequences])
        try:
            return cast("list[Suspended | None]", work.result(timeout_s))
        except FutureTimeoutError:
            work.cancel()
            raise BackendError(f"the engine ended no round within {timeout_s:g} s") from None

    def report_step(self, tokens: int) -> None:
        """Count a step that ended just now; only work in `call` may use this.

        Args:
            tokens: tokens that the step ran.
        """
        self._core.report_step(tokens)

    def stats(self) -> SchedulerStats:
        """Return the counters and the state of this moment."""
        core, backend, pool = self._core, self._core.backend, self._core.roster.pool
        counts, drafting = core.counts, core.drafting
        waiting, running = self._thread.load()
        return SchedulerStats(
            running=running,
            waiting=waiting,
            calls=self._thread.num_calls,
            queue_capacity=self.queue_capacity,
            num_slots=backend.num_slots,
            kv_used_tokens=pool.used_tokens,
            kv_cached_tokens=pool.cached_tokens,
            kv_capacity_tokens=backend.num_slots * backend.capacity,
            slots=tuple(
                SlotState(slot.in_use, slot.length, slot.cached_rows) for slot in pool.slots
            ),
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            completion_tokens=counts["completion"],
            preempted=counts["preempted"],
            drafted_tokens=counts["drafted"],
            accepted_tokens=counts["accepted"],
            draft_steps=counts["draft_steps"],
            draft_saved_s=drafting.saved_s if drafting else 0.0,
            drafts_failed=drafting.failed if drafting else None,
            steps=core.times.steps,
            last_step_s=core.times.ended_s,
            full_step_s=core.times.full_step_s(core.policy.step_tokens),
            failed=self._thread.failed or backend.failed,
            outcomes=dict(core.delivery.outcomes),
        )

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those that are there.

        Args:
            timeout_s: most seconds to wait; None sets no limit.

        Returns:
            Whether all ended in time.
        """
        return self._thread.drain(timeout_s)

    @property
    def drains(self) -> bool:
        """Whether no more requests are taken, however long one waits (`drain`)."""
        return self._thread.draining

    def close(self) -> None:
        """Cancel everything and end the thread; calling it twice is harmless."""
        self._thread.close()

    def check_count(self, n: int) -> None:
        """Refuse a number of answers that can never be submitted together.

        Raises:
            RequestError: it is not an integer, less than one, or more than may run and wait.
        """
        given: object = n
        if isinstance(given, bool) or not isinstance(given, Integral) or n < 1:
            raise RequestError(f"n must be an integer of at least 1, not {n!r}")
        most = self.max_batch + self.queue_capacity
        if n > most:
            raise RequestError(
                f"{n} answers at once are more than the {most} that may run or wait; ask for "
                "fewer, or raise queue_capacity"
            )

    def _check(self, request: Request) -> None:
        """Refuse, in the caller's thread, a request that can never run."""
        num_tokens, capacity = len(request.ids), self._core.backend.capacity
        if (state := request.resume_from) is not None:
            _check_resumed(request, state)
            # A slot that has slid has fewer rows than tokens, and a full one slides before the
            # next.
            kept = state.saved_rows
            num_tokens = num_tokens + len(state.answer) if kept is None else len(kept.ids) - 1
        if not request.ids:
            raise RequestError("the prompt is empty; give at least one token")
        self._core.steps.embeddings.check(np.array(request.ids))
        if num_tokens >= capacity:
            raise ContextLengthError(num_tokens, capacity)
        priority: Any = request.priority  # from a caller, perhaps of the wrong type
        if not isinstance(priority, Integral):
            raise RequestError(f"a priority must be an integer, not {priority!r:.80}")
        deadline_s: Any = request.deadline_s
        if deadline_s is not None and not (isinstance(deadline_s, int | float) and deadline_s > 0):
            raise RequestError(f"a deadline must be a positive number of s, not {deadline_s!r:.80}")


def _check_resumed(request: Request, state: Suspended) -> None:
    """Refuse rows that are not those of the request's tokens."""
    if state.saved_rows is None:
        return
    ids, kept = [*request.ids, *state.answer], state.saved_rows
    rest = len(ids) - state.pending
    if (
        not 0 <= rest < len(ids)
        or kept.rows.length != len(kept.ids)
        or (kept.shareable and kept.ids != ids[:rest])
    ):
        raise RequestError("the saved rows are not those of this prompt and answer")


class _EngineThread:
    """The thread, and the state that callers share with it, all guarded by one condition.

    It holds no reference to the scheduler, so a scheduler that is dropped ends it.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._changed = threading.Condition()
        self._inbox: deque[SequenceState] = deque()
        self._calls: deque[_Job] = deque()
        self._between: deque[_Job] = deque()
        self._in_call = False
        self._thread: threading.Thread | None = None
        self.draining = False
        self._closing = False
        self.failed: str | None = None
        _LIVE.add(self)

    # ------------------------------------------------------------------ in callers' threads

    def take_in(self, sequences: list[SequenceState], most: int) -> None:
        """Queue sequences of one client, all or none; at most ``most`` may then run or wait."""
        with self._changed:
            self._refuse_if_down()
            if self.draining:
                raise OverloadError("no more requests are taken: shutting down", _FIRST_RETRY_S)
            if sum(self.load()) + len(sequences) > most:
                self._make_room(sequences, most)
            self._start()
            self._inbox.extend(sequences)
            self._changed.notify_all()

    def _make_room(self, sequences: list[SequenceState], most: int) -> None:
        """Drop the newest waiting submissions of the clients that have most waiting.

        If a submission has partly started, only its other sequences are dropped, and sequences that
        were preempted are kept. Cancelled ones count as gone.

        Raises:
            OverloadError: the client with most is the one that comes; nothing was dropped.
        """
        roster = self._core.roster
        waiting = [s for s in (*roster.waiting, *self._inbox) if not (s.dropped or s.cancelled)]
        present = sum(not s.cancelled for s in roster.running) + len(waiting)
        waiting = [sequence for sequence in waiting if sequence.may_be_dropped]
        excess = present + len(sequences) - most
        if excess <= 0:
            return
        error = OverloadError(
            f"{present} sequences run or wait and at most {most} may, so {len(sequences)} more "
            "cannot be taken; try again later",
            self._core.delivery.mean_run_s * excess / self._core.policy.max_batch or _FIRST_RETRY_S,
        )
        counts = Counter(sequence.request.client for sequence in waiting)
        own = counts[sequences[0].request.client] + len(sequences)
        dropped: list[SequenceState] = []
        while len(dropped) < excess:
            client, number = counts.most_common(1)[0] if counts else ("", 0)
            if number <= own:
                self._core.delivery.outcomes["rejected"] += len(sequences)
                raise error
            newest = max(s.submission for s in waiting if s.request.client == client)
            dropped += (sequence for sequence in waiting if sequence.submission == newest)
            counts[client] = number - sum(s.submission == newest for s in waiting)
            waiting = [sequence for sequence in waiting if sequence.submission != newest]
        for sequence in dropped:
            sequence.dropped = OverloadError(
                "the queue is full, and no client has more in it than this one, so its newest "
                "requests made room for another's; try again later",
                error.retry_after_s,
            )

    def call(self, work: Callable[[], object]) -> Future[object]:
        """Queue work that needs the backend for itself; from this thread it runs at once."""
        if threading.current_thread() is not self._thread:
            return self._queue(self._calls, lambda core: core.call(work))
        if not self._in_call:  # in the queue it would wait for itself
            raise BackendError(
                "a constraint or sink cannot use the backend while its sequence runs"
            )
        future: Future[object] = Future()
        _settle(future, lambda core: core.call(work), self._core)
        return future

    def between(self, work: Callable[[EngineCore], object]) -> Future[object]:
        """Do work between two rounds, whatever runs."""
        return self._queue(self._between, work)

    def _queue(self, queue: deque[_Job], work: Callable[[EngineCore], object]) -> Future[object]:
        future: Future[object] = Future()
        with self._changed:
            self._refuse_if_down()
            self._start()
            queue.append((future, work))
            self._changed.notify_all()
        return future

    def load(self) -> tuple[int, int]:
        """Return how many sequences wait and how many run."""
        with self._changed:
            return len(self._inbox) + len(self._core.roster.waiting), len(self._core.roster.running)

    @property
    def num_calls(self) -> int:
        """Return how many calls wait or run."""
        with self._changed:
            return len(self._calls) + self._in_call

    def drain(self, timeout_s: float | None) -> bool:
        """Take no more sequences; returns whether those that are there ended in time."""
        with self._changed:
            self.draining = True
            return self._changed.wait_for(lambda: not sum(self.load()), timeout_s)

    def signal_close(self) -> None:
        """Ask the thread to end; safe wherever garbage is collected."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread and wait for it."""
        self.signal_close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _refuse_if_down(self) -> None:
        if self._closing:
            raise BackendError("the backend is closed; load the bundle again")
        failed = self.failed or self._core.backend.failed
        if failed is not None:
            raise BackendError(f"the engine can serve no more: {failed}")

    def _start(self) -> None:
        """Start the thread if it does not run; call it before anything is queued."""
        if self._thread is None:
            # It is a daemon, since otherwise a program that forgets `close` would never end. And
            # `close` runs at exit, since the interpreter would be torn down around a running step.
            thread = threading.Thread(target=self._run, name="edge-llm-engine", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise ResourceError(
                    f"the engine's thread could not be started ({error}); free memory or raise the "
                    "limit of processes (ulimit -u)"
                ) from error
            self._thread = thread
            atexit.register(self.close)

    def give_up_after_fork(self) -> None:
        """Give up in a child process: the thread is missing, and may have held the lock."""
        self._changed = threading.Condition()
        self._thread = None
        self._inbox.clear()
        self._calls.clear()
        self._between.clear()
        self._core.abandon_all()
        self.failed = _FORKED

    # ------------------------------------------------------------------ in the engine's thread

    def _run(self) -> None:
        try:
            while self._take_work():
                self._core.step()
                failed = self._core.backend.failed
                if failed is not None:
                    self._core.end_all(BackendError(f"the engine failed: {failed}"))
        except BaseException as error:  # noqa: BLE001 - the fault of no one sequence: all end
            # A panic in a Rust library is not an Exception, and nobody sees a thread's exit.
            _log.exception("the engine's thread failed")
            self.failed = f"{type(error).__name__}: {error}"
        finally:
            self._end()

    def _take_work(self) -> bool:
        """Wait for work and take in new sequences; returns false when closing."""
        while True:
            call = None
            with self._changed:
                while self._core.is_idle and not (
                    self._closing or self._inbox or self._calls or self._between
                ):
                    self._changed.notify_all()  # wakes threads that drain
                    self._changed.wait()
                if self._closing:
                    return False
                while self._inbox:
                    self._core.add(self._inbox.popleft())
                between, self._between = self._between, deque()
                if not between:
                    self._core.hold = bool(self._calls)
                    if not self._calls or self._core.roster.running or self._core.may_start:
                        return True
                    call = self._calls.popleft()
                    self._in_call = True
            if call is None:
                for future, work in between:
                    _settle(future, work, self._core)
                continue
            try:
                _settle(*call, self._core)
            finally:
                self._in_call = False
            # Callers in a loop would starve sequences, and these would starve the callers.
            self._core.turn = min(self.load()[0], self._core.policy.max_batch)

    def _end(self) -> None:
        with self._changed:
            failed = self.failed
            while self._inbox:
                self._core.add(self._inbox.popleft())
            self._core.end_all(None if failed is None else BackendError(failed))
            waiting = [future for future, _ in (*self._calls, *self._between)]
            self._calls.clear()
            self._between.clear()
            for future in waiting:
                if future.set_running_or_notify_cancel():
                    future.set_exception(
                        BackendError(failed or "the backend was closed while this waited for it")
                    )
            self._changed.notify_all()
        atexit.unregister(self.close)


_LIVE: weakref.WeakSet[_EngineThread] = weakref.WeakSet()


def _after_fork() -> None:
    for thread in list(_LIVE):
        thread.give_up_after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _settle(future: Future[object], work: Callable[[EngineCore], object], core: EngineCore) -> None:
    """Do work, and complete its future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work(core))
    except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
        future.set_exception(error)
