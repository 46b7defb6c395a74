"""Stores responses: they can run without a client, continue after a restart, be fetched later.

A response in the background (``background: true``) belongs to the server: it continues when its
client leaves. When the server stops, it saves the response with its tokens and cache rows, and the
next server continues it, if there is a directory for it. For any other a client waits, and the
answer is stored at its end unless the client says ``store: false``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from starlette.responses import Response

from edge.bundle.kv_scales import pack_rows
from edge.errors import EdgeError, OverloadError, ResourceError
from edge.runtime.kv_cache import SavedRows
from edge.runtime.prefix_store import Layout, bundle_key
from edge.runtime.scheduler import Suspended
from edge_serve.api.protocol import decode
from edge_serve.api.respond import Answer, Plan, Resumed, Turn, begin, json_response
from edge_serve.http.access import Client
from edge_serve.http.bodies import BodyAccount, BodyBudget
from edge_serve.http.errors import APIError, as_api_error, draining, invalid
from edge_serve.http.threads import ClientGoneError, Lane, in_thread
from edge_serve.models.registry import Choice, ModelRegistry
from edge_serve.pictures.parts import has_pictures
from edge_serve.settings import ServerSettings
from edge_serve.stored.bounded import BoundedStore, TooLargeError
from edge_serve.stored.record import Record, StoredRows, Unfinished, rows_sha256
from edge_serve.stored.store import ResponseStore

from .answers import DeletedResponse, ResponseObject
from .plan import plan_response
from .protocol import ResponsesRequest
from .render import ResponseRender, cancel, cut, fail

if TYPE_CHECKING:
    from edge.runtime.llm import LLM
    from edge.runtime.stream import GenerationChunk
    from edge_serve.observe.metrics import Metrics

_log = logging.getLogger("edge_serve")
MOST_BEGINS = 3
"""How many servers may be killed while they run a response before it is given up."""
MOST_STARTS = 2
"""How many may be killed while they read one in order to continue it."""
SUSPEND_S = 30.0
"""Seconds after which a stopping server writes no more cache rows."""
_ROUND_S = 10.0  # that an engine may take to finish a round
_MOST_UNSAVED = 100
_MOST_UNSAVED_BYTES = 32 * 2**20
_RETRY_S = 1.0
_OFF = (
    "nothing is stored here; the operator of the server can set responses_dir, a directory to keep "
    "responses in"
)


class _CancelledError(Exception):
    """The response is no longer wanted."""


@dataclass(eq=False)
class _Live:
    """A response that runs, waits to continue, or could not be written at its end.

    Attributes:
        record: the record as last stored.
        response: the answer so far.
        account: counts the request's bytes until the response has ended.
        answer: the running computation; None before it continues, and at its end.
        replayed: tokens of the answer that are read again after a restart.
        is_deleted: whether the response was deleted, so that nothing of it is kept.
        is_unsaved: whether it has ended and could not be written.
    """

    record: Record
    response: ResponseObject
    account: BodyAccount
    answer: Answer | None = None
    replayed: int = 0
    is_deleted: bool = False
    is_unsaved: bool = False

    @property
    def has_ended(self) -> bool:
        return self.response.status not in ("queued", "in_progress")


class StoredResponses:
    """The server's stored responses; only the event loop's thread may call it.

    Args:
        models: the models that are served.
        settings: limits of the server.
        metrics: counts the ends of responses that continue after a restart.
        store: where responses are kept; None keeps none. Only a directory's responses continue
            after a restart.
    """

    def __init__(
        self,
        models: ModelRegistry,
        settings: ServerSettings,
        metrics: Metrics,
        store: BoundedStore | None,
    ) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics
        self._store = store
        self._directory = store if isinstance(store, ResponseStore) else None
        self._live: dict[str, _Live] = {}
        self._writing = asyncio.Lock()  # keeps writes in the order of the events
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._lane, self._form_lane = (
            Lane(name, full="too many responses go on", late="it did not go on", queue_capacity=1)
            for name in ("edge-resumed", "edge-resumed-grammar")
        )
        # Requests in the background stay when their clients have gone.
        self._budget = BodyBudget(settings.max_inflight_body_bytes, settings.most_body_bytes)
        directory = self._directory
        self._to_resume = dict.fromkeys(() if directory is None else directory.unfinished())

    # ------------------------------------------------------------------------------- requests

    async def read(self, body: ResponsesRequest, client: Client) -> ResponsesRequest:
        """Check what a request asks of the store, and prepend the conversation that it continues.

        Raises:
            APIError: 400, the request cannot be stored or continued.
        """
        if body.background:
            if self._store is None:
                raise invalid(f"background: send false; {_OFF}", "background")
            if body.store is False:
                raise invalid(
                    "background: a response in the background is stored, or nobody could have it; "
                    "leave store out or send true",
                    "background",
                )
            if body.stream:
                raise invalid(
                    "stream: a response in the background is fetched by its id, as far as it has "
                    "come; send false",
                    "stream",
                )
        if (previous := body.previous_response_id) is None:
            return body
        name = "previous_response_id"
        if self._store is None:
            raise invalid(f"{name}: {_OFF}; or send the whole conversation as input", name)
        found = await self._find(previous, client)
        if found is None:
            raise invalid(
                f"{name}: there is no such response; send the whole conversation as input",
                name,
                "previous_response_not_found",
            )
        record, response = found
        if response.status not in ("completed", "incomplete"):
            raise invalid(
                f"{name}: that response is {response.status}, and only one that is completed or "
                "incomplete can be gone on with",
                name,
            )
        said = [
            *_items(msgspec.json.decode(record.request, type=_Asked).input),
            *msgspec.to_builtins(response.output),
            *_items(body.input),
        ]
        return replace(body, input=said, previous_response_id=None)

    async def respond(
        self, turn: Turn, body: ResponsesRequest, previous: str | None = None
    ) -> Response:
        """Answer a request; one that runs in the background is answered at once.

        Args:
            turn: the request's context.
            body: the request as `read` returned it.
            previous: id of the response whose conversation it continues.

        Raises:
            EdgeError, APIError: the request is wrong, cannot be served or stored now (503, 429),
                or failed; or the server is about to stop.
            ClientGoneError: the client left before it had the answer.
        """
        stored = self._store is not None and body.store is not False
        render = ResponseRender(turn, body, stored=stored, previous=previous)
        plan = partial(_plan, turn, body)
        if not stored:
            return await (await begin(turn, plan, render)).send(turn)
        response = render.response
        request = await in_thread(partial(msgspec.json.encode, body))
        record = Record(
            id=response.id,
            client=turn.client.name,
            created_at=response.created_at,
            request=msgspec.Raw(request),
            response=msgspec.Raw(b"{}"),
        )
        account = self._budget.account(turn.client.origin)
        try:
            if body.background:
                account.grow_to(len(request))
            answer = await begin(turn, plan, render)
        except BaseException:
            account.close()
            raise
        live = self._live[record.id] = _Live(record, response, account, answer)
        self._watch(live)
        if not body.background:
            return await answer.send(turn, response)
        record.unfinished = _beginning(turn, answer)
        answer.flight.start(partial(self._write, live, render))
        if self._is_closing:
            self._drop(live)
            raise draining()
        try:
            if self._directory is not None:
                await self._save(live)
        except ResourceError as error:
            _log.error("a response cannot be stored: %s", error)
            self._drop(live)
            raise APIError(
                503,
                "storage_full",
                "the response cannot be stored, as the disk or the store is full; delete stored "
                "responses, or send background: false",
                retry_after_s=30,
            ) from error
        return json_response(response, turn.headers)

    async def retrieve(self, id_: str, client: Client, query: Mapping[str, str]) -> Response:
        """Answer with a stored response in its present state.

        Raises:
            APIError: 400 for a wrong query, 404 if there is no such response.
        """
        for name, value in query.items():
            if (name, value) != ("stream", "false"):
                raise invalid(
                    f"{name}: a stored response comes whole and as it stands; ask without it",
                    name,
                )
        found = await self._find(id_, client)
        if found is None:
            self._not_found()
        return json_response(found[1])

    async def cancel(self, id_: str, client: Client) -> Response:
        """End a response in the background; its output so far stays.

        Raises:
            APIError: 400 if it is not in the background, 404 if there is no such response.
        """
        found = await self._find(id_, client)
        if found is None:
            self._not_found()
        record, response = found
        if not response.background:
            raise invalid(
                "only a response in the background can be cancelled; close the connection of "
                "another one",
                code="not_in_background",
            )
        live = self._live.get(id_)
        if live is None and id_ in self._to_resume:
            live = self._revive(record, response)
        if live is not None and not live.has_ended:
            if live.answer is not None:
                live.answer.flight.abort(_CancelledError())
                await asyncio.sleep(0)  # lets callbacks that wait for its end run
            else:
                cancel(live.response)
                self._keep(live)
            response = live.response
        return json_response(response)

    async def delete(self, id_: str, client: Client) -> Response:
        """Remove a response; one that still runs is ended first.

        Raises:
            APIError: 404 if there is no such response, 503 if it cannot be removed.
        """
        if await self._find(id_, client) is None:
            self._not_found()
        self._to_resume.pop(id_, None)
        if (live := self._live.get(id_)) is not None:
            self._drop(live)
        assert self._store is not None
        try:
            async with self._writing:
                await in_thread(partial(self._store.delete, id_))
        except ResourceError as error:
            _log.error("%s", error)
            raise APIError(503, "storage_failed", "the response cannot be removed") from error
        return json_response(DeletedResponse(id_))

    # ------------------------------------------------------------------------------- restarts

    async def resume(self) -> None:
        """Continue responses that have not ended; call it when the models are open.

        They are read one by one, and it returns when all of them are queued. One that cannot
        continue ends with the reason.
        """
        for id_ in list(self._to_resume):
            assert self._directory is not None
            record = await in_thread(partial(self._directory.load, id_))
            if id_ not in self._to_resume:
                continue  # it was cancelled or deleted
            response = None if record is None else _response_of(record)
            if record is None or response is None:
                del self._to_resume[id_]
                continue
            live = self._revive(record, response)
            try:
                while not (self._is_closing or await self._try_to_resume(live)):
                    await asyncio.sleep(_RETRY_S)
            except Exception as error:  # noqa: BLE001 - the others go on
                if self._is_closing:
                    return  # the next server continues it
                answer = as_api_error(error)
                log = _log.warning if isinstance(error, APIError | EdgeError) else _log.exception
                log("response %s does not go on: %s", live.record.id, error)
                if not live.has_ended:
                    fail(live.response, answer)
                    self._keep(live)
            if self._is_closing:
                return

    async def suspend(self) -> None:
        """Take background responses out of the engines and save them, to continue later.

        A response that cannot be saved is computed again from its last stored state. Without a
        directory they end, as nobody could have them.
        """
        self._is_closing = True
        if self._directory is None:
            for live in list(self._live.values()):
                if live.answer is not None and live.response.background:
                    live.answer.flight.abort(_CancelledError())
            return
        until = monotonic() + SUSPEND_S
        waiting: dict[LLM, list[_Live]] = {}
        running: dict[LLM, list[_Live]] = {}
        for live in self._live.values():
            if live.answer is not None and live.response.background and not live.has_ended:
                which = waiting if live.response.status == "queued" else running
                which.setdefault(live.answer.model.llm, []).append(live)
        # Save waiting responses first and together, or they would start as others leave. Then save
        # the running ones one by one, so that only one has its rows in memory.
        for llm, lives in waiting.items():
            await self._suspend(llm, lives, until)
        for llm, lives in running.items():
            for live in lives:
                if not await self._suspend(llm, [live], until):
                    break

    async def close(self) -> None:
        """Wait until all ended responses are written, and release the directory."""
        self._is_closing = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        for live in [each for each in self._live.values() if each.has_ended]:
            await self._save_end(live)
        if self._store is not None:
            await in_thread(self._store.close)

    def _revive(self, record: Record, response: ResponseObject) -> _Live:
        """Take up a response that an earlier server left unfinished."""
        assert record.unfinished is not None
        account = self._budget.account(record.unfinished.origin)
        account.take(_size(record.request))
        del self._to_resume[record.id]
        live = self._live[record.id] = _Live(record, response, account)
        return live

    async def _try_to_resume(self, live: _Live) -> bool:
        """Do `_resume` unless it has ended; give up one that servers did not survive reading.

        Raises:
            APIError, EdgeError: it cannot continue.
        """
        directory = self._directory
        assert directory is not None
        if live.has_ended or live.is_deleted:
            return True
        starts = await in_thread(partial(directory.begin_start, live.record.id))
        try:
            if starts >= MOST_STARTS:
                raise APIError(
                    500,
                    "interrupted",
                    f"the server was killed {starts} times while it read this response",
                )
            return await self._resume(live)
        finally:
            await in_thread(partial(directory.end_start, live.record.id))

    async def _resume(self, live: _Live) -> bool:
        """Queue one response again; return False if there is no room for it now.

        Raises:
            APIError, EdgeError: it cannot continue.
        """
        unfinished = live.record.unfinished
        assert unfinished is not None
        if unfinished.begins >= MOST_BEGINS:
            raise APIError(
                500,
                "interrupted",
                f"the server was killed {unfinished.begins} times while it ran this response",
            )
        try:
            choice = await self._models.choose(unfinished.model)
        except OverloadError:  # too many requests wait for the model
            return False
        except APIError as error:
            if error.code == "no_room":
                return False
            raise
        with choice.model.lease():  # keeps it loaded until the answer has begun
            return await self._resume_on(choice, live)

    async def _resume_on(self, choice: Choice, live: _Live) -> bool:
        record, unfinished, llm = live.record, live.record.unfinished, choice.model.llm
        assert unfinished is not None
        if bundle_key(llm.manifest) != unfinished.bundle:
            raise APIError(
                409,
                "bundle_changed",
                "the server was restarted with another bundle, which cannot go on with this "
                "response; ask again",
            )
        state = await in_thread(partial(self._state_of, record, llm))
        length = len(unfinished.prompt) + len(state.answer)
        if state.saved_rows is None and length >= llm.kv_capacity:
            cut(live.response)
            self._keep(live)
            return True
        most = self._settings.max_nesting
        body = await in_thread(partial(decode, bytes(record.request), ResponsesRequest, most))
        turn = Turn(
            model=choice.model,
            adapter=choice.adapter,
            client=Client(record.client, unfinished.salt, unfinished.origin),
            settings=self._settings,
            metrics=self._metrics,
            receive=_stay,
            lane=self._lane,
            form_lane=self._form_lane,
            headers={},
            arm=unfinished.arm,
            priority=unfinished.priority,
        )
        render = ResponseRender(
            turn,
            body,
            id_=record.id,
            created_at=record.created_at,
            stored=True,
            previous=live.response.previous_response_id,
        )
        resumed = Resumed(unfinished.prompt, state, unfinished.left_s)
        try:
            answer = await begin(turn, partial(_plan, turn, body), render, resumed)
        except OverloadError:
            return False
        if live.is_deleted or live.has_ended:
            answer.flight.abort(_CancelledError())
            answer.flight.start(lambda index, chunk: None)
            return True
        live.answer, live.replayed = answer, len(unfinished.answer)
        self._watch(live)
        answer.flight.start(partial(self._write, live, render))
        if self._is_closing:
            await self._suspend(llm, [live], monotonic() + SUSPEND_S)
            return True
        # Its rows leave the disk: after a kill, prompt and answer are read again.
        unfinished = replace(unfinished, rows=None, begins=unfinished.begins + 1)
        live.record = replace(record, unfinished=unfinished)
        try:
            await self._save(live)
        except ResourceError as error:
            _log.warning("response %s goes on, and its file is as it was: %s", record.id, error)
        return True

    async def _suspend(self, llm: LLM, lives: list[_Live], until: float) -> bool:
        """Save responses, with their rows if there is time until then.

        Returns:
            Whether the engine handed over their states.
        """
        lives = [live for live in lives if live.answer is not None]
        answers = [live.answer for live in lives if live.answer is not None]
        generations = [answer.generations[0] for answer in answers]
        try:
            states = await in_thread(partial(llm.suspend, generations, _ROUND_S))
        except EdgeError as error:
            _log.error("responses are not suspended, and start again after the restart: %s", error)
            return False
        for live, answer, state in zip(lives, answers, states, strict=True):
            if state is not None:  # otherwise it has just ended
                await self._save_rows(live, answer, state, until)
        return True

    async def _save_rows(self, live: _Live, answer: Answer, state: Suspended, until: float) -> None:
        unfinished = live.record.unfinished
        assert unfinished is not None
        backend = answer.model.llm.backend
        await asyncio.wait({answer.flight.done})  # its output so far is read
        unfinished = replace(
            unfinished,
            answer=list(state.answer),
            pending=state.pending,
            left_s=_left_s(answer),
            begins=0,
            rows=None,
        )
        packed = None
        if (kept := state.saved_rows) is not None and monotonic() < until:
            packed = await in_thread(partial(pack_rows, kept.rows, backend.kv_scales))
            unfinished.rows = StoredRows(
                Layout.of_rows(backend, kept.rows),
                kept.ids,
                kept.prefilled,
                kept.shared,
                kept.shareable,
                rows_sha256(packed),
            )
        live.record = replace(live.record, unfinished=unfinished)
        try:
            await self._save(live, packed)
        except ResourceError as error:
            _log.error("response %s begins anew after the restart: %s", live.record.id, error)
        else:
            _log.info("response %s is suspended after %d tokens", live.record.id, len(state.answer))

    def _state_of(self, record: Record, llm: LLM) -> Suspended:
        """Return the state to continue from; without rows if another engine made them."""
        unfinished, kept = record.unfinished, None
        assert unfinished is not None
        assert self._directory is not None
        if (stored := unfinished.rows) is not None:
            backend = llm.backend
            same = stored.layout.on(backend)
            fits = stored.layout.tensors and len(stored.ids) <= llm.kv_capacity
            if same != stored.layout or not fits:
                _log.warning(
                    "response %s: its rows are of %s, and this is %s; prompt and answer are read "
                    "again", record.id, stored.layout, same,
                )  # fmt: skip
            elif (rows := self._directory.load_rows(record.id, backend.kv_scales)) is not None:
                books = stored.prefilled, stored.shared, stored.shareable
                kept = SavedRows(rows, list(stored.ids), *books)
        return Suspended(unfinished.seed, tuple(unfinished.answer), unfinished.pending, kept)

    # ------------------------------------------------------------------------------- ends

    def _watch(self, live: _Live) -> None:
        assert live.answer is not None
        live.answer.flight.done.add_done_callback(partial(self._ended, live))

    def _write(
        self, live: _Live, render: ResponseRender, index: int, chunk: GenerationChunk
    ) -> None:
        """Take a chunk of a background response."""
        assert live.answer is not None
        if chunk.finish_reason == "cancelled" and self._is_closing:
            return  # it was saved for the next server
        live.answer.write(index, chunk)
        live.replayed -= len(chunk.tokens)
        if live.replayed <= 0 or chunk.finish_reason is not None:
            live.response = render.response

    def _ended(self, live: _Live, done: asyncio.Future[None]) -> None:
        error = done.exception()
        if live.is_deleted:
            return
        live.answer = None
        if isinstance(error, _CancelledError | ClientGoneError):
            cancel(live.response)
        elif self._is_closing and live.response.background and not live.has_ended:
            return  # the next server continues it
        elif error is not None:
            fail(live.response, as_api_error(error))
        self._keep(live)

    def _drop(self, live: _Live) -> None:
        """End a response without keeping anything of it."""
        live.is_deleted = True
        live.account.close()
        self._live.pop(live.record.id, None)
        if live.answer is not None:
            live.answer.flight.abort(_CancelledError())

    def _keep(self, live: _Live) -> None:
        """Schedule an ended response to be written; until then it is in memory."""
        live.is_unsaved = False
        live.account.close()
        live.record = replace(live.record, unfinished=None)
        task = asyncio.create_task(self._save_end(live))
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)

    async def _save_end(self, live: _Live) -> None:
        try:
            await self._save(live)
        except TooLargeError as error:
            _log.error("response %s is lost: %s", live.record.id, error)
        except ResourceError as error:
            _log.error("response %s stays in memory: %s", live.record.id, error)
            live.is_unsaved = True
            unsaved = [each for each in self._live.values() if each.is_unsaved]
            sizes = [_size(each.record.request) for each in unsaved]
            while len(unsaved) > _MOST_UNSAVED or sum(sizes) > _MOST_UNSAVED_BYTES:
                oldest, _ = unsaved.pop(0), sizes.pop(0)
                _log.error("response %s is lost", oldest.record.id)
                del self._live[oldest.record.id]
            return
        if self._live.get(live.record.id) is live:
            del self._live[live.record.id]
        # There may be room now for responses that could not be written.
        other = next((each for each in self._live.values() if each.is_unsaved), None)
        if other is not None and not self._is_closing:
            self._keep(other)

    async def _save(self, live: _Live, rows: NDArray[np.uint8] | None = None) -> None:
        """Write a response in its present state.

        Raises:
            ResourceError: it cannot be written.
        """
        assert self._store is not None
        response = msgspec.Raw(msgspec.json.encode(live.response))
        record = replace(live.record, response=response)
        async with self._writing:
            if live.is_deleted:
                return
            if rows is None:
                await in_thread(partial(self._store.save, record))
            else:
                assert self._directory is not None
                await in_thread(partial(self._directory.save_with_rows, record, rows))

    # ------------------------------------------------------------------------------- look-ups

    async def _find(self, id_: str, client: Client) -> tuple[Record, ResponseObject] | None:
        """Find a response of this client; None if it has none with this id."""
        if self._store is None:
            return None
        if (live := self._live.get(id_)) is not None:
            record, response = live.record, live.response
        else:
            stored = await in_thread(partial(self._store.load, id_))
            shown = None if stored is None else _response_of(stored)
            if stored is None or shown is None:
                return None
            record, response = stored, shown
        return (record, response) if record.client == client.name else None

    def _not_found(self) -> NoReturn:
        why = _OFF if self._store is None else "it was deleted, is too old, or another client's"
        raise APIError(404, "not_found", f"there is no stored response of this id: {why}")


def _plan(turn: Turn, body: ResponsesRequest) -> Plan:
    """Plan a request; a background response reports its progress from the beginning."""
    plan = plan_response(turn, body)
    if body.background and any(has_pictures(ask.prompt) for ask in plan.asks):
        raise invalid(
            "background: the rows of pictures are not kept for a restart; send false", "background"
        )
    asks = [dataclasses.replace(ask, progress=bool(body.background)) for ask in plan.asks]
    return dataclasses.replace(plan, asks=asks)


def _beginning(turn: Turn, answer: Answer) -> Unfinished:
    """Return the state from which a response is computed again."""
    (generation,) = answer.generations
    return Unfinished(
        model=turn.model_name,
        bundle=bundle_key(turn.model.llm.manifest),
        seed=generation.seed,
        prompt=generation.prompt_ids,
        salt=turn.client.salt,
        origin=turn.client.origin,
        arm=turn.arm,
        priority=turn.priority,
        left_s=_left_s(answer),
    )


def _response_of(record: Record) -> ResponseObject | None:
    """Read the answer of a record; None if another version wrote it."""
    try:
        response = msgspec.json.decode(record.response, type=ResponseObject)
    except msgspec.ValidationError as error:
        _log.warning("response %s is left alone, as it is of another version: %s", record.id, error)
        return None
    return response


def _size(data: msgspec.Raw) -> int:
    return memoryview(data).nbytes


class _Asked(msgspec.Struct):
    """The part of a stored request that a conversation needs."""

    input: str | list[dict[str, Any]]


def _items(value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the input of a request as items."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return value


def _left_s(answer: Answer) -> float | None:
    """Return the seconds that an answer may still take."""
    return None if answer.deadline_s is None else max(answer.deadline_s - monotonic(), 1.0)


async def _stay() -> Any:
    """Wait forever, like the connection of a client that never leaves."""
    await asyncio.get_running_loop().create_future()
