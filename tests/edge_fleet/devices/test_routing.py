"""The choice of a device: where a key was last, else its home, else who has a free slot."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edge_fleet.devices import routing
from edge_fleet.devices.ring import Ring
from edge_fleet.devices.routing import Router


@dataclass
class Place:
    name: str
    in_flight: int = 0
    slots: int = 2
    asked: int = 0

    @property
    def load(self) -> float:
        return self.in_flight / self.slots

    def may(self) -> bool:
        self.asked += 1
        return True


def fleet(count: int) -> tuple[Router, dict[str, Place]]:
    names = [f"d{i}" for i in range(count)]
    return Router(names), {name: Place(name) for name in names}


def test_a_key_goes_home_then_down_the_ring_then_to_the_least_load():
    router, places = fleet(5)
    order = list(Ring(places).order("key"))
    for taken in range(5):
        chosen = router.choose("key", places, lambda place: True)
        assert chosen is places[order[taken]]
        chosen.in_flight = 2
    places[order[3]].slots = 4
    places[order[3]].in_flight = 5  # 1.25 a slot; all others have 1.0
    assert router.choose("key", places, lambda place: True) is places[order[0]]
    places[order[2]].in_flight = 3
    places[order[0]].in_flight = 3
    assert router.choose("key", places, lambda place: True) is places[order[1]]


def test_a_key_stays_where_it_was_until_that_is_full_or_gone():
    router, places = fleet(5)
    order = list(Ring(places).order("key"))
    router.remember("key", order[3])
    assert router.choose("key", places, lambda place: True) is places[order[3]]
    places[order[3]].in_flight = 2
    assert router.choose("key", places, lambda place: True) is places[order[0]]
    for place in places.values():
        place.in_flight = 2
    assert router.choose("key", places, lambda place: True) is places[order[3]]  # among equals
    gone = places[order[3]]
    assert router.choose("key", places, lambda place: place is not gone) is places[order[0]]
    assert router.choose("key", places, lambda place: False) is None
    assert router.choose(None, places, lambda place: False) is None


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routing, "_KEYS", 3)
    router, places = fleet(5)
    away = {key: list(Ring(places).order(key))[3] for key in "abcd"}
    for key in "abcacd":
        router.remember(key, away[key])
    found = {key for key in "abcd" if router.choose(key, places, Place.may) is places[away[key]]}
    assert found == set("acd")


def test_of_many_devices_few_are_looked_at():
    router, places = fleet(1000)
    for i in range(50):
        assert router.choose(f"key {i}", places, Place.may) is not None
    assert sum(place.asked for place in places.values()) == 50


def test_what_has_no_key_takes_turns_among_the_least_loaded():
    router, places = fleet(4)
    places["d0"].in_flight = 1
    chosen = [router.choose(None, places, lambda place: True) for _ in range(30)]
    assert {place.name for place in chosen if place is not None} == {"d1", "d2", "d3"}
