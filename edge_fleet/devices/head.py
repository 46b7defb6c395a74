"""Serves the fleet's ``/v1``: chooses a device for each request and passes its answer on.

It knows nothing of Ray: a `Link` leads to each device. Limits, keys and the form of errors are
those of ``edge-llm serve``, whose guard stands before this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
from starlette.exceptions import HTTPException

import edge
from edge_serve.api.anthropic.errors import error_envelope
from edge_serve.api.error_forms import error_body
from edge_serve.api.sse import event, named_event
from edge_serve.http.access import APIKeys
from edge_serve.http.errors import APIError
from edge_serve.http.guard import App, Guard, Receive, Scope, Send, read_body
from edge_serve.http.threads import until_gone
from edge_serve.observe.metric_families import CONTENT_TYPE
from edge_serve.settings import ServerSettings

from .affinity import Affinity, affinity
from .config import FleetConfig
from .members import Asked, Attempt, Facts, Link, LostError, Member, judge
from .metrics import OUTCOMES, render
from .routing import Router

_log = logging.getLogger("edge_fleet")
_TEXT = ("/chat/completions", "/completions", "/responses", "/messages", "/messages/count_tokens")
_OTHER = ("/embeddings", "/rerank", "/models")
PASSED_ON = frozenset(
    [prefix + path for path in (*_TEXT, *_OTHER) for prefix in ("/v1", "")]
    + ["/tokenize", "/detokenize", "/tokenizer_info", "/openapi.json"]
    + [f"/api/{name}" for name in ("chat", "generate", "show", "tags", "ps", "version")]
    + ["/api/embed", "/api/embeddings"]
)
"""Paths of a device's service that the head has, too; below ``/v1/models/`` all of them."""
_SHOWN = ("content-type", "authorization", "x-api-key", "anthropic-version", "accept")
_KEPT_BACK = frozenset(
    b"connection keep-alive transfer-encoding content-length date server x-request-id request-id "
    b"x-content-type-options".split()
)
_STREAMS = (b"text/event-stream", b"application/x-ndjson")
_LOOKS = 4  # at one device at once
_SHORT_S, _JUDGE_REST = 1e-3, 20  # to judge may take a twentieth of a head's time


class _Done(NamedTuple):
    """The answer was passed on whole."""


class _Busy(NamedTuple):
    """The device took the request not: its queue is full (429), or it is not ready (503)."""

    status: int
    retry_after_s: float


class _Lost(NamedTuple):
    """The device, or its service, was lost before the answer was whole."""

    begun: bool
    reason: str


class FleetHead:
    """The endpoint of a fleet.

    Args:
        config: the fleet's file.
        links: the way to each device of the file.
        max_connections: connections to clients that may be open at once.
        drained_file: names the devices that an operator took out, for the heads after this one.

    Attributes:
        settings: limits of the HTTP server.
        app: the ASGI application.
        is_draining: set, POST is refused.
        accepted: hashes of bundles that a roll-out brings or replaces, and that devices may have
            beside the one that most have.

    Raises:
        ConfigError: the file of API keys cannot be used.
    """

    def __init__(
        self,
        config: FleetConfig,
        links: Mapping[str, Link],
        max_connections: int = 1024,
        drained_file: Path | None = None,
    ) -> None:
        self._config = config
        self._drained_file = drained_file
        self.members = {name: Member(name, links[name]) for name in config.devices}
        if drained_file is not None and drained_file.exists():
            for name in self.members.keys() & set(drained_file.read_text().split()):
                self.members[name].draining = True
        self._router = Router(self.members)
        self.settings = ServerSettings(
            host=config.host,
            port=config.port,
            allow_open=config.allow_open,
            api_key_file=None if config.api_key_file is None else Path(config.api_key_file),
            max_body_bytes=config.max_body_bytes,
            max_connections=max_connections,
            max_inflight_body_bytes=max(64 * 2**20, config.max_body_bytes),
            rate_limit_address_rps=0,  # one gateway may ask for all; devices bound their own work
        )
        path = self.settings.api_key_file
        keys = None if path is None else APIKeys(path)
        self.is_draining = False
        self._rejections: Counter[str] = Counter()
        self.accepted = self._judged_with = frozenset[str]()
        self._judge_at = 0.0  # on the loop's clock
        self._judging: asyncio.TimerHandle | None = None
        self.app: App = Guard(
            self._route,
            self.settings,
            keys,
            is_draining=lambda: self.is_draining,
            on_rejection=self._count_rejection,
            error_body=error_body,
        )

    # ------------------------------------------------------------------------------- devices

    async def watch(self) -> None:
        """Look at every device, for ever."""
        await asyncio.gather(*(self._watch(member) for member in self.members.values()))

    async def _watch(self, member: Member) -> None:
        """Look at every beat, whether or not the last look has an answer.

        A look on its way when a device dies waits in vain, and the next one is told at once that
        there is nobody; one that is late for want of processor time still is a sign of life.
        """
        looks: set[asyncio.Task[None]] = set()
        while True:
            if len(looks) < _LOOKS:
                look = asyncio.create_task(self.look(member))
                looks.add(look)
                look.add_done_callback(looks.discard)
                look.add_done_callback(_taken)
            await asyncio.sleep(self._config.beat_s)
            with self._told(member):
                member.judge_silence(self._config)

    async def look(self, member: Member) -> None:
        """Look at a device once."""
        try:
            seen = await asyncio.wait_for(member.link.look(), self._config.dead_s)
        except asyncio.TimeoutError:
            return
        except LostError as error:
            with self._told(member):
                if member.facts is not None:
                    member.lose(str(error))
            return
        with self._told(member):
            try:
                member.saw(msgspec.convert(seen, Facts))
            except msgspec.ValidationError as error:
                member.lose(f"it speaks another version of the fleet's protocol: {error}")

    @contextlib.contextmanager
    def _told(self, member: Member) -> Iterator[None]:
        """Log a change of a device's state, and judge all where it may mean something to them."""
        trouble, before = member.trouble, (member.facts, member.present)
        yield
        if (member.facts, member.present) != before or self._judged_with != self.accepted:
            self._judged_with = self.accepted
            loop = asyncio.get_running_loop()
            if loop.time() >= self._judge_at:
                self._judge()
            elif self._judging is None:
                self._judging = loop.call_at(self._judge_at, self._judge)
        if member.trouble != trouble:
            _log.warning("device %s: %s", member.name, member.trouble or "ready")

    def _judge(self) -> None:
        """Judge all devices; 1,000 that come at once would take all of a head's time."""
        if self._judging is not None:
            self._judging.cancel()
            self._judging = None
        began = time.thread_time()
        judge(self.members.values(), self._config, self.accepted)
        took_s = time.thread_time() - began
        if took_s > _SHORT_S:
            self._judge_at = asyncio.get_running_loop().time() + _JUDGE_REST * took_s

    def set_draining(self, name: str, draining: bool) -> int:
        """Take a device out or back in; returns how many requests still run there."""
        self.members[name].draining = draining
        if self._drained_file is not None:
            drained = [each.name for each in self.members.values() if each.draining]
            temp = self._drained_file.with_suffix(".new")
            temp.write_text("\n".join(drained))
            temp.replace(self._drained_file)
        return self.members[name].in_flight

    @property
    def in_flight(self) -> int:
        """Requests that run or wait at the devices."""
        return sum(member.in_flight for member in self.members.values())

    def status(self) -> dict[str, Any]:
        """Return the state of the fleet as plain data."""
        return {
            "version": edge.__version__,
            "draining": self.is_draining,
            "in_flight": self.in_flight,
            "accepted": sorted(self.accepted),
            "devices": {name: member.status() for name, member in self.members.items()},
        }

    # ------------------------------------------------------------------------------- requests

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if method not in ("GET", "POST"):
            raise APIError(405, "method_not_allowed", "use GET or POST", allow="GET, POST")
        if path == "/health":
            await _send_json(send, {"status": "ok"})
        elif path == "/ready":
            ready = sum(member.takes for member in self.members.values())
            if self.is_draining or not ready:
                raise self._nobody(Affinity(None, None))
            await _send_json(send, {"status": "ready", "devices": ready})
        elif path == "/stats":
            await _send_json(send, self.status())
        elif path == "/metrics":
            await _send(send, render(self.members.values(), self._rejections), CONTENT_TYPE)
        elif path in PASSED_ON or path.startswith(("/v1/models/", "/models/")):
            await self._pass_on(scope, receive, send)
        else:
            raise HTTPException(404)

    def _count_rejection(self, reason: str) -> None:
        self._rejections[reason] += 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(reversed(scope["headers"]))  # the first of each name counts
        body, place = b"", Affinity(None, None)
        if scope["method"] == "POST":
            body = await read_body(scope, receive, self.settings)
            place = affinity(scope["path"], headers, body, scope["client_name"])
        target = quote(scope["path"])  # what was let through, however it was written
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        shown = [
            (name, headers[name.encode()].decode("latin-1"))
            for name in _SHOWN
            if name.encode() in headers
        ]
        if said := [value for name, value in scope["headers"] if name == b"priority"]:
            shown.append(("priority", b", ".join(said).decode("latin-1")))  # one list (RFC 8941)
        shown.append(("x-request-id", scope["request_id"]))
        asked = Asked(scope["method"], target, shown, body)
        relaying = asyncio.ensure_future(self._relay(asked, place, scope, send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({relaying, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not relaying.done():
                raise ConnectionError("the client left")
            relaying.result()
        finally:
            for task in (relaying, gone):
                task.cancel()
                task.add_done_callback(_taken)

    async def _relay(self, asked: Asked, place: Affinity, scope: Scope, send: Send) -> None:
        """Ask devices until one has answered; raises where none does."""
        tried: set[str] = set()
        busy: list[_Busy] = []
        lost = 0
        while (member := self._choose(place, tried)) is not None:
            tried.add(member.name)
            outcome = await self._try(member, asked, send)
            if isinstance(outcome, _Done):
                self._router.remember(place.key, member.name)
                return
            if isinstance(outcome, _Busy):
                busy.append(outcome)
                continue
            _log.warning(
                "request %s: device %s was lost: %s",
                scope["request_id"],
                member.name,
                outcome.reason,
            )
            error = APIError(
                503,
                "device_lost",
                f"the device {member.name} was lost while it answered; ask again",
                retry_after_s=1,
            )
            if outcome.begun:
                last = _last_event(error, scope)
                await send({"type": "http.response.body", "body": last, "more_body": False})
                return
            lost += 1
            if lost > 1:
                raise error
        raise self._nobody(place, busy)

    def _choose(self, place: Affinity, tried: set[str]) -> Member | None:
        """Choose a device that has room: the key's own one, unless others have a free slot."""
        model = place.model
        # A name that no device has is the devices' to refuse, or to find among their splits.
        named = model is not None and any(self._able(model))

        def may(member: Member) -> bool:
            if not member.takes or not member.has_room or member.name in tried:
                return False
            return not named or model is None or member.serves(model)

        return self._router.choose(place.key, self.members, may)

    def _able(self, model: str | None) -> Iterator[Member]:
        """Go through those that take requests, for this model if one is named."""
        for member in self.members.values():
            if member.takes and (model is None or member.serves(model)):
                yield member

    def _nobody(self, place: Affinity, busy: list[_Busy] | None = None) -> APIError:
        able = [*self._able(place.model)] or [*self._able(None)]
        waits = [one.retry_after_s for one in busy or () if one.status == 429]
        if waits or any(not member.has_room for member in able):
            return APIError(
                429,
                "queue_full",
                f"all {len(able)} devices that could answer are full; try again in a moment",
                retry_after_s=min(waits, default=1.0),
            )
        return APIError(
            503, "no_device", "no device of the fleet is ready; try again later", retry_after_s=5
        )

    async def _try(self, member: Member, asked: Asked, send: Send) -> _Done | _Busy | _Lost:
        with member.attempt() as attempt:
            pump = asyncio.ensure_future(_pump(member, attempt, asked, send))
            try:
                waits: set[asyncio.Future[Any]] = {pump, attempt.lost}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if not pump.done():
                    member.counts["lost"] += 1
                    return _Lost(attempt.begun, attempt.lost.result())
                outcome = pump.result()
            finally:
                pump.cancel()
                pump.add_done_callback(_taken)
        member.counts[_COUNTED[type(outcome)]] += 1
        if isinstance(outcome, _Lost) and not outcome.begun:
            member.trouble = outcome.reason  # until the next look, so that nobody else runs into it
        return outcome


_COUNTED = dict(zip((_Done, _Busy, _Lost), OUTCOMES, strict=True))


async def _pump(
    member: Member, attempt: Attempt, asked: Asked, send: Send
) -> _Done | _Busy | _Lost:
    """Pass a device's answer on: a stream event by event, anything else when it is whole."""
    try:
        async with contextlib.aclosing(member.link.ask(asked)) as items:
            first = await anext(items, None)
            if not isinstance(first, tuple):
                return _Lost(False, "its service does not answer")
            member.alive()
            status, headers = first
            if status in (429, 503) and _value(headers, b"x-should-retry") != b"false":
                after = _value(headers, b"retry-after")
                return _Busy(status, float(after) if after.isdigit() else 1.0)
            headers = [(name, value) for name, value in headers if name not in _KEPT_BACK]
            headers.append((b"x-edge-device", member.name.encode()))
            start = {"type": "http.response.start", "status": status}
            is_stream = status == 200 and _value(headers, b"content-type").startswith(_STREAMS)
            rest = b""
            async for item in items:
                if item is None:
                    return _Lost(attempt.begun, "its service broke off")
                assert isinstance(item, bytes)
                member.alive()
                rest += item
                if not is_stream:
                    continue
                # Only whole events, so that an error can follow whatever was sent.
                events, rest = _split(rest)
                if events:
                    if not attempt.begun:
                        attempt.begun = True
                        await send(start | {"headers": headers})
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            if not attempt.begun:
                headers.append((b"content-length", str(len(rest)).encode()))
                await send(start | {"headers": headers})
            await send({"type": "http.response.body", "body": rest, "more_body": False})
            return _Done()
    except LostError as error:
        return _Lost(attempt.begun, str(error))


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Split off the events that are whole; lines of Ollama's protocol end with one line break."""
    end = data.rfind(b"\n") + 1
    if data.startswith((b"data:", b"event:", b":", b"id:", b"retry:")):
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
    return data[:end], data[end:]


def _last_event(error: APIError, scope: Scope) -> bytes:
    """Write the error that ends a stream, in the form of the path's protocol."""
    path: str = scope["path"]
    if path.endswith("/messages"):
        return named_event("error", error_envelope(error, scope["request_id"]))
    if path.startswith("/api/"):
        return error_body(error, scope) + b"\n"
    if path.endswith("/responses"):
        fields = {"code": error.code, "message": error.shown, "param": None}
        return named_event("error", {"type": "error", **fields})
    return event(error.envelope())


def _value(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _taken(task: asyncio.Future[Any]) -> None:
    """Take the result of a task that nobody waits for any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.debug("given up: %s", error)


async def _send_json(send: Send, value: Any) -> None:
    await _send(send, msgspec.json.encode(value), "application/json")


async def _send(send: Send, body: bytes, content_type: str) -> None:
    headers = [
        (b"content-type", content_type.encode()),
        (b"cache-control", b"no-store"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
