"""Runs a batch: every request once, as many at a time as keep the slots busy."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

from edge.engine_config import EngineConfig
from edge.errors import ConfigError, OverloadError
from edge_make.progress import Progress, silent, uncounted
from edge_serve.http.priority import BACKGROUND
from edge_serve.settings import ServerSettings

from . import TIMEOUT_S, WAIT_S
from .clients import Asker, HttpAnswer, HttpAsker, LocalAsker, NoAnswerError, refused_key
from .files import Journal, Requests
from .rows import Row, RowError, answer_line, bad_line, failure_line, is_json

ATTEMPTS = 5
"""Tries of a request whose connection broke or whose answer was a server error."""
_SYNC_S = 5.0
_BUSY = (429, 503)
_FAULTS = (408, 500, 502, 504)
_FIRST_WAIT_S, _MOST_WAIT_S = 0.5, 30.0


@dataclass(frozen=True)
class BatchResult:
    """The result of a batch.

    Attributes:
        rows: lines of the input, without blank ones.
        answered: rows in the file of answers, including those of earlier runs.
        failed: rows in the file of errors, including those of earlier runs.
        stopped: whether a signal stopped it before its end.
    """

    rows: int
    answered: int
    failed: int
    stopped: bool = False

    @property
    def left(self) -> int:
        """Rows that have neither answer nor error yet."""
        return self.rows - self.answered - self.failed


def run_batch(
    source: str | Path,
    output: str | Path,
    *,
    models: Mapping[str, str | Path] | None = None,
    url: str | None = None,
    errors: str | Path | None = None,
    api_key: str | None = None,
    engine: EngineConfig | None = None,
    concurrency: int | None = None,
    wait_s: float = WAIT_S,
    timeout_s: float | None = None,
    progress: Progress = silent,
) -> BatchResult:
    """Answer a file of requests in OpenAI's Batch format (docs/batch.md).

    Answers are written as they come. The same call resumes a run that ended early for any reason.
    In the main thread SIGINT and SIGTERM stop it between two lines.

    Args:
        source: JSONL of ``custom_id``, ``method``, ``url`` and ``body``.
        output: file of the answers with status 200.
        models: bundles to open, by the names in the requests.
        url: a server of OpenAI's API to ask instead.
        errors: file of the other rows; by default ``output`` with ``.errors.jsonl``.
        api_key: key for the server.
        engine: how bundles are opened.
        concurrency: requests at once; None is one more than there are slots.
        wait_s: seconds to wait for a server that gives no good answer.
        timeout_s: seconds that one answer may take; None is `TIMEOUT_S` for a server, and no limit
            in this process.
        progress: called with the rows done (step ``batch``).

    Raises:
        ConfigError: the arguments or the key are wrong, or files belong to something else.
        RequestError: ``source`` cannot be read or has no row.
        OverloadError: the server gave no good answer for ``wait_s``.
        BackendError: the engine in this process failed.
        ResourceError: the disk is full.
    """
    if (models is None or not models) == (url is None):
        raise ConfigError("a batch needs something to ask: either models or url")
    if url is None and api_key is not None:
        raise ConfigError("an API key is for url; leave it out")
    if url is not None and engine is not None:
        raise ConfigError("engine options are for models, and url has its own; leave them out")
    if concurrency is not None and concurrency < 1:
        raise ConfigError(f"concurrency is {concurrency}; at least one request must run")
    if not (wait_s >= 0 and (timeout_s is None or timeout_s > 0)):
        raise ConfigError(f"wait_s is {wait_s} and timeout_s {timeout_s}; they are seconds")
    source, output = Path(source), Path(output)
    errors = default_errors(output) if errors is None else Path(errors)
    _check_files(source, output, errors)
    asker: Asker
    if url is not None:
        asker = HttpAsker(
            url,
            api_key=api_key,
            concurrency=concurrency,
            timeout_s=TIMEOUT_S if timeout_s is None else timeout_s,
            priority=BACKGROUND,
        )
    else:
        assert models is not None
        engine = engine or EngineConfig()
        given = {field.name: getattr(engine, field.name) for field in fields(EngineConfig)}
        paths = {name: Path(path) for name, path in models.items()}
        settings = ServerSettings(
            **given,
            model=paths,
            default_model=next(iter(paths)) if len(paths) == 1 else None,
            request_timeout_s=timeout_s,
        )
        asker = LocalAsker(settings, priority=BACKGROUND, concurrency=concurrency)
    with ExitStack() as stack:
        requests = Requests(source, progress)
        stack.callback(requests.close)
        answers = Journal(output)
        stack.callback(answers.close)
        failures = Journal(errors)
        stack.callback(failures.close, remove_empty=True)
        for journal in (answers, failures):
            requests.mark_done(journal)
        return asyncio.run(_Batch(requests, answers, failures, asker, wait_s, progress).run())


def default_errors(output: Path) -> Path:
    """Name the file of errors for a file of answers."""
    return output.with_suffix(".errors.jsonl")


def _check_files(source: Path, output: Path, errors: Path) -> None:
    """Refuse to overwrite the requests, or to write both kinds of answers into one file."""
    paths = [path.resolve() for path in (source, output, errors)]
    if len(set(paths)) < len(paths):
        raise ConfigError(
            f"requests ({source}), answers ({output}) and errors ({errors}) are three files; name "
            "them apart"
        )


class _Batch:
    """One run over the rows that are left."""

    def __init__(
        self,
        requests: Requests,
        answers: Journal,
        failures: Journal,
        asker: Asker,
        wait_s: float,
        progress: Progress,
    ) -> None:
        self._requests = requests
        self._answers = answers
        self._failures = failures
        self._asker = asker
        self._wait_s = wait_s
        self._progress = progress
        self._rows = requests.rows(self._refuse)
        self._trouble_s: float | None = None  # since when there was no good answer, retries apart
        self._under_way: dict[int, float] = {}  # when the request of each line was sent

    async def run(self) -> BatchResult:
        stopped = asyncio.Event()
        self._report()
        try:
            with _signals(stopped):
                stopping = asyncio.create_task(stopped.wait())
                working = asyncio.create_task(self._work())
                waiting = {stopping, working}
                while not (stopping.done() or working.done()):
                    await asyncio.wait(
                        waiting, timeout=_SYNC_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    self._answers.sync()
                    self._failures.sync()
                stopping.cancel()
                if not working.done():
                    working.cancel()
                    await self._asker.close()
                with contextlib.suppress(asyncio.CancelledError):
                    await working
        finally:
            await self._asker.close()
        done = self._answers.num_rows + self._failures.num_rows
        total = self._requests.num_rows
        return BatchResult(
            total, self._answers.num_rows, self._failures.num_rows, stopped=done < total
        )

    async def _work(self) -> None:
        with uncounted(self._progress, "open"):
            await self._get_ready()
        workers = [asyncio.create_task(self._take()) for _ in range(self._asker.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _get_ready(self) -> None:
        tries = 0
        while True:
            try:
                answer = await self._asker.ready()
                if answer is None:
                    self._trouble_s = None
                    return
                what = f"it answered {answer.status}"
            except NoAnswerError as error:
                answer, what = None, str(error)
            await self._wait(what, answer, tries)
            tries += 1

    async def _take(self) -> None:
        """Ask one row after the other."""
        for row in self._rows:
            journal, line = await self._answer(row)
            journal.append(line)
            self._report()

    async def _answer(self, row: Row) -> tuple[Journal, bytes]:
        """Ask a row until there is a final answer; return its line, and the file for it."""
        tries = attempts = 0
        while True:
            answer: HttpAnswer | None = None
            sent_s = self._under_way[row.line] = time.monotonic()
            try:
                answer = await self._asker.ask(row.url, row.body)
            except NoAnswerError as error:
                what, counts = str(error), error.was_sent
            else:
                what, counts = f"it answered {answer.status}", answer.status in _FAULTS
                if self._stands(answer):
                    self._trouble_s = None
                    return self._line_of(row, answer)
            finally:
                del self._under_way[row.line]
            attempts += counts
            if counts and self._trouble_s is not None:
                # They have a limit of their own, so that a slow row ends as a failure, too.
                self._trouble_s += time.monotonic() - max(sent_s, self._trouble_s)
            if attempts >= ATTEMPTS:
                if answer is not None:
                    return self._line_of(row, answer)
                message = f"no answer after {attempts} attempts: {what}"
                return self._failures, failure_line(row, "no_answer", message)
            await self._wait(what, answer, tries)
            tries += 1

    def _stands(self, answer: HttpAnswer) -> bool:
        """Whether an answer is final, and not from a server that cannot answer now.

        Raises:
            ConfigError: no row will be answered with this key.
        """
        if answer.status in (401, 403):
            raise refused_key(self._asker.name, answer)
        return answer.status not in (*_BUSY, *_FAULTS) or not answer.may_retry

    def _line_of(self, row: Row, answer: HttpAnswer) -> tuple[Journal, bytes]:
        if answer.status == 200 and not is_json(answer.body):
            return self._failures, failure_line(row, "invalid_answer", "the answer is no JSON")
        journal = self._answers if answer.status == 200 else self._failures
        request_id = answer.headers.get("x-request-id", "")
        return journal, answer_line(row, answer.status, request_id, answer.body)

    async def _wait(self, what: str, answer: HttpAnswer | None, tries: int) -> None:
        """Wait before another try.

        Raises:
            OverloadError: the server has failed for too long.
        """
        now = time.monotonic()
        if self._trouble_s is None:
            self._trouble_s = now
        left_s = self._trouble_s + self._wait_s - now
        # A long answer that is still being written shows that the server is alive.
        if left_s <= 0 and all(sent > self._trouble_s for sent in self._under_way.values()):
            done = self._answers.num_rows + self._failures.num_rows
            raise OverloadError(
                f"{self._asker.name} has given no good answer for {self._wait_s:g} s ({what}); "
                f"{done} of {self._requests.num_rows} rows are done, and the same command goes on"
            )
        asked_s = None if answer is None else answer.retry_after_s
        if asked_s is None:
            asked_s = min(_FIRST_WAIT_S * 2 ** min(tries, 16), _MOST_WAIT_S)
            asked_s *= random.uniform(0.5, 1.0)  # so that not all come back at once
        await asyncio.sleep(min(max(asked_s, 0.05), max(left_s, 1.0)))

    def _refuse(self, number: int, error: RowError) -> None:
        self._failures.append(bad_line(number, error))
        self._report()

    def _report(self) -> None:
        failed = self._failures.num_rows
        done = self._answers.num_rows + failed
        detail = f"{failed} failed" if failed else ""
        self._progress("batch", done, self._requests.num_rows, "rows", detail)


@contextlib.contextmanager
def _signals(stopped: asyncio.Event) -> Iterator[None]:
    """Make SIGINT and SIGTERM set an event once; a second signal acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        stopped.set()
        remove()

    def remove() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        remove()
