"""The simulation of fleets: reproducible, fair between rules, and it tells them apart."""

from __future__ import annotations

import pytest

from scripts.fleet_simulation import RULES, Case, Figures, Fleet, knee
from scripts.simulated_devices import Head, HeadCost, sessions

pytestmark = pytest.mark.once

FREE = HeadCost(0.0, 0.0, 0.0)


def play(rule: str, losses: float = 0.0, rate: float = 0.1, cost: HeadCost = FREE) -> Figures:
    return Fleet(4, rule, rate, length_s=300, losses=losses, seed=3, cost=cost).run()


def test_the_same_seed_gives_the_same_and_sessions_find_their_prefixes():
    hashed, again, chance = play("hash"), play("hash"), play("random")
    assert hashed == again
    assert hashed.cached_share > 1.5 * chance.cached_share


def test_a_rule_changes_nothing_but_where_requests_go():
    """On one device there is nothing to choose, so that all rules must give one result."""
    found = [Fleet(1, rule, 0.02, length_s=900, seed=3, cost=FREE).run() for rule in RULES]
    assert found[0].tokens > 1000
    assert all(each == found[0] for each in found)
    begun = list(sessions(0.1, 2.0, 300.0, 3))
    assert begun == list(sessions(0.1, 2.0, 300.0, 3))
    assert begun != list(sessions(0.1, 2.0, 300.0, 4))


@pytest.mark.parametrize("rule", RULES)
def test_what_a_lost_device_had_begun_is_answered_elsewhere(rule: str):
    fleet = Fleet(4, rule, 0.2, length_s=400, losses=0.5, seed=3, cost=FREE)
    found = fleet.run()
    lost = [each for each in fleet.devices.values() if each.lost_s is not None]
    assert len(lost) == 2
    assert found.asked_again > 0
    assert not any(device.running or device.is_known for device in lost)
    calm = Fleet(4, rule, 0.2, length_s=400, seed=3, cost=FREE).run()
    assert calm.asked_again == 0
    assert calm.percentile(99) < found.percentile(99)


def test_a_head_without_time_is_what_limits():
    """At 0.2 s for a token it passes on 5 a second, of whatever the devices compute."""
    slow = play("hash", cost=HeadCost(0.0, 0.2, 0.0))
    assert slow.head > 0.99
    assert slow.tokens == pytest.approx(5 * slow.seconds, rel=0.02)
    assert slow.percentile(50) > 10 * play("hash").percentile(50)
    head = Head(HeadCost(0.01, 0.0, 0.1), devices=4, beat_s=0.5)  # 80 % of its time are looks
    assert head.work(1.0, head.request_s) == pytest.approx(1.05)
    assert head.work(1.0, head.request_s) == pytest.approx(1.10)  # after the other


def test_the_knee_is_the_last_rate_at_which_answers_come_in_time():
    def figures(ttft_s: float) -> Figures:
        return Figures(1.0, 1, ttft_s=[ttft_s])

    rows = [
        (Case(10, rate, "hash"), [figures(ttft_s), figures(ttft_s), figures(99.0)])
        for rate, ttft_s in ((2.0, 3.0), (0.5, 0.4), (1.0, 0.5))
    ]
    assert knee(rows) == "1"
    assert knee(rows[1:]) == "1 or more"
    assert knee(rows[:1]) == "below 2"
