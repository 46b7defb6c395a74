"""Keeps what the head knows of each device: its facts, whether it lives, and what runs there."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import msgspec

import edge

from .config import Difference, FleetConfig


class LostError(Exception):
    """A device cannot be reached, or its service broke an answer off."""


class Asked(NamedTuple):
    """A request for a device's own service.

    Attributes:
        method: HTTP's method.
        target: path and query.
        headers: what the service should see.
        body: JSON, or nothing.
    """

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes


Head = tuple[int, list[tuple[bytes, bytes]]]
Item = Head | bytes | None
"""Of an answer: first status and headers, then bytes; None where the service broke off."""


class Link(Protocol):
    """The way to one device."""

    def ask(self, asked: Asked) -> AsyncGenerator[Item, None]:
        """Send a request; yields its answer, or raises `LostError`."""
        ...

    async def look(self) -> Mapping[str, Any]:
        """Return what `Facts` holds, as plain data, or raise `LostError`."""
        ...


class Model(msgspec.Struct, frozen=True):
    """A model of a device: its bundle's hash, its room and what computes it."""

    sha256: str
    slots: int
    queue: int
    context: int
    backend: str


class Facts(msgspec.Struct, frozen=True):
    """What a device says of itself.

    Attributes:
        version: of edge-llm in its fleet part.
        service: of edge-llm in its service; empty while that has never answered.
        kind: the board, or the machine's architecture.
        models: by name; empty while they load.
        trouble: why it takes no requests; None where it is ready.
    """

    version: str
    service: str
    kind: str
    models: dict[str, Model]
    trouble: str | None = None

    @property
    def slots(self) -> int:
        """Requests that run at once."""
        return sum(model.slots for model in self.models.values())

    @property
    def room(self) -> int:
        """Requests that run or wait at most."""
        return self.slots + sum(model.queue for model in self.models.values())


class Attempt:
    """A request at a device.

    Attributes:
        begun: whether the client has seen bytes of this answer.
        lost: set, with the reason, once there is nothing to wait for.
    """

    def __init__(self) -> None:
        self.begun = False
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def lose(self, reason: str) -> None:
        """Give the answer up."""
        if not self.lost.done():
            self.lost.set_result(reason)


class Member:
    """One device as the head sees it.

    Args:
        name: its name.
        link: the way to it.
        clock: monotonic seconds.

    Attributes:
        facts: what it said last; None before it was ever seen.
        trouble: why it gets no requests; None where it may.
        present: whether it answered last; one that is gone says nothing of which bundle is right.
        difference: how it differs from the fleet; None where it fits or has not been seen.
        admitted: whether it is let in: it fits, or its difference is allowed.
        draining: whether an operator took it out.
        counts: requests by outcome: answered, busy, lost.
        slots: requests that it computes at once.
    """

    def __init__(self, name: str, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.link = link
        self.facts: Facts | None = None
        self.trouble: str | None = "absent: it has not joined"
        self.present = False
        self.difference: str | None = None
        self.admitted = False
        self.draining = False
        self.counts: Counter[str] = Counter()
        self.slots = self._room = 0
        self._clock = clock
        self._sign = clock()
        self._attempts: set[Attempt] = set()

    @property
    def in_flight(self) -> int:
        """Requests of the head that run or wait there."""
        return len(self._attempts)

    @property
    def takes(self) -> bool:
        """Whether it may get a request at all."""
        return self.trouble is None and self.admitted and not self.draining

    @property
    def has_room(self) -> bool:
        """Whether its queue would take one more, as far as the head knows."""
        return self.in_flight < self._room

    @property
    def load(self) -> float:
        """Requests per slot."""
        return self.in_flight / max(1, self.slots)

    def serves(self, model: str) -> bool:
        """Whether it has a model of this name."""
        return self.facts is not None and model in self.facts.models

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Count a request while it is there."""
        attempt = Attempt()
        self._attempts.add(attempt)
        try:
            yield attempt
        finally:
            self._attempts.discard(attempt)

    def alive(self) -> None:
        """Note a sign of life."""
        self._sign = self._clock()

    def saw(self, facts: Facts) -> None:
        """Take what it says of itself; a service that is gone answers nothing any more."""
        self.alive()
        self.present = True
        self.facts = facts if facts.models or self.facts is None else _later(self.facts, facts)
        self.slots, self._room = self.facts.slots, self.facts.room
        self.trouble = facts.trouble

    def judge_silence(self, config: FleetConfig) -> None:
        """Lose a device that has been silent for too long."""
        silent_s = self._clock() - self._sign
        if self.present and silent_s >= config.silent_s:
            self.lose(f"silent for {silent_s:.1f} s")
        if silent_s >= config.dead_s:
            self.end("it is silent")

    def lose(self, reason: str) -> None:
        """Send nothing more there; what has not begun goes elsewhere."""
        self.present = False
        self.trouble = reason
        for attempt in tuple(self._attempts):
            if not attempt.begun:
                attempt.lose(reason)

    def end(self, reason: str) -> None:
        """End everything that runs there."""
        for attempt in tuple(self._attempts):
            attempt.lose(reason)

    def status(self) -> dict[str, Any]:
        """Return its state as plain data."""
        state, reason = "ready", self.trouble
        if self.trouble is not None:
            state = "absent" if self.facts is None else "not ready"
        elif not self.admitted:
            state, reason = "refused", self.difference
        elif self.draining:
            state = "draining"
        facts = self.facts
        return {
            "state": state,
            "reason": reason,
            "differs": self.difference if self.admitted else None,
            "kind": facts and facts.kind,
            "version": facts and facts.service,
            "models": msgspec.to_builtins(facts.models) if facts else {},
            "in_flight": self.in_flight,
            "slots": self.slots,
            "requests": dict(self.counts),
        }


def _later(old: Facts, new: Facts) -> Facts:
    return msgspec.structs.replace(old, trouble=new.trouble)


def judge(members: Iterable[Member], config: FleetConfig, accepted: Collection[str] = ()) -> None:
    """Let in the devices that fit, and say of all others how they differ.

    Bundles must be those that most of the devices that are present have; among equally many those
    of the device that comes first in the file. Nothing is remembered, so the answer does not depend
    on who came first. During a roll-out a bundle may also be one of those that are accepted.
    """
    seen = [(m, m.facts) for m in members if m.present and m.facts is not None and m.facts.models]
    votes: dict[str, Counter[str]] = {}
    for _, facts in seen:
        for name, model in facts.models.items():
            votes.setdefault(name, Counter())[model.sha256] += 1
    usual = {name: counter.most_common(1)[0][0] for name, counter in votes.items()}
    names = Counter(frozenset(facts.models) for _, facts in seen)
    for member, facts in seen:
        differences = _differences(facts, config, usual, names.most_common(1)[0][0], accepted)
        refused = {kind: text for kind, text in differences.items() if kind not in config.allow}
        member.admitted = not refused
        member.difference = next(iter((refused or differences).values()), None)


def _differences(
    facts: Facts,
    config: FleetConfig,
    usual: Mapping[str, str],
    names: frozenset[str],
    accepted: Collection[str],
) -> dict[Difference, str]:
    found: dict[Difference, str] = {}
    for what, version in (("fleet part", facts.version), ("service", facts.service)):
        if version != edge.__version__:
            found["version"] = (
                f"its {what} is edge-llm {version}, the head has {edge.__version__}; install the "
                'same, or say allow = ["version"]'
            )
    for name, model in facts.models.items():
        if model.sha256 not in (usual[name], *accepted):
            found["bundle"] = (
                f"its {name} has the hash {model.sha256[:12]}, that of most devices is "
                f'{usual[name][:12]}; copy that bundle, or say allow = ["bundle"]'
            )
        if model.context < config.min_context:
            found["size"] = (
                f"its {name} holds {model.context} tokens, min_context is {config.min_context}; "
                'serve with a larger --kv-capacity, or say allow = ["size"]'
            )
    if names != frozenset(facts.models):
        found["bundle"] = (
            f"it serves {_list(facts.models)}, most devices serve {_list(names)}; serve the same "
            'names, or say allow = ["bundle"]'
        )
    if facts.slots < config.min_slots:
        found["size"] = (
            f"it has {facts.slots} slots, min_slots is {config.min_slots}; serve with more "
            '--num-slots, or say allow = ["size"]'
        )
    return found


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
