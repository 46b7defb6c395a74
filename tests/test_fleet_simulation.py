"""The simulation of fleets: reproducible, and it tells rules of routing apart."""

from __future__ import annotations

from scripts.fleet_simulation import Figures, Fleet


def play(rule: str, losses: float = 0.0, rate: float = 0.1) -> Figures:
    return Fleet(4, rule, rate, length_s=120, losses=losses, seed=3).run()


def test_the_same_seed_gives_the_same_and_sessions_find_their_prefixes():
    hashed, again, chance = play("hash"), play("hash"), play("random")
    assert hashed == again
    assert hashed.cached / hashed.prompt > 1.5 * chance.cached / chance.prompt


def test_what_a_lost_device_had_begun_is_answered_elsewhere():
    fleet = Fleet(4, "least", 0.5, length_s=120, losses=0.5, seed=3)
    sessions = sum(kind == "turn" for _, _, kind, _ in fleet.events)
    found = fleet.run()
    assert found.retried > 0
    assert found.turns >= sessions
    assert not any(device.running for device in fleet.devices if device.is_alive)
