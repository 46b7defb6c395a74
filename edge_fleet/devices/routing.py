"""Chooses among devices: where a key's prefix is, unless that has no free slot and others have."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from .ring import Ring

_KEYS = 65_536


class Place(Protocol):
    """What counts of a device."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def in_flight(self) -> int:
        """Requests that run or wait there."""

    @property
    def slots(self) -> int:
        """Requests that it computes at once."""

    @property
    def load(self) -> float:
        """Requests per slot."""


_P = TypeVar("_P", bound=Place)


class Router:
    """The rule, and where each key's prefix is now.

    Args:
        names: all devices.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._ring = Ring(names)
        self._turn = itertools.count()
        self._last: OrderedDict[str, str] = OrderedDict()

    def choose(
        self, key: str | None, places: Mapping[str, _P], may: Callable[[_P], bool]
    ) -> _P | None:
        """Choose a device; None where none may.

        Args:
            key: equal for requests that share a prefix; None goes where the load is least.
            places: all devices by name.
            may: whether a device can take the request.
        """
        if key is None:
            open_ones = [place for place in places.values() if may(place)]
            if not open_ones:
                return None
            # Equal loads take turns.
            first = next(self._turn) % len(open_ones)
            return min(open_ones[first:] + open_ones[:first], key=lambda place: place.load)
        best: _P | None = None
        last = self._last.get(key)
        # As a rule the first has a free slot, so that however many devices there are, few are seen.
        for name in itertools.chain(() if last is None else (last,), self._ring.order(key)):
            place = places[name]
            if place is best or not may(place):
                continue
            if place.in_flight < place.slots:
                return place
            if best is None or place.load < best.load:
                best = place
        return best

    def remember(self, key: str | None, name: str) -> None:
        """Keep where a key's prefix is now, which after a spill or a loss is not its home."""
        if key is None:
            return
        self._last[key] = name
        self._last.move_to_end(key)
        if len(self._last) > _KEYS:
            self._last.popitem(last=False)
