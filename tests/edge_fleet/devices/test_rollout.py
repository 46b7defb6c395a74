"""Who rolls out next, and when to stop. No Ray: head and devices are scripted, time is counted."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edge
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DeadlineError,
    EdgeError,
    GateError,
    RegistryError,
)
from edge_fleet.devices.client import Fleet
from edge_fleet.devices.config import Device, FleetConfig
from edge_fleet.devices.errand import Errand, Order, Report
from edge_fleet.devices.members import Facts, LostError, Member, Model, judge
from edge_fleet.devices.rollout import LEASE_S, PATIENCE_S, Driver, FleetRollout

DIGEST = "sha256:" + "1" * 64
ORDER = Order(f"registry.example.com/r1@{DIGEST}")
OLD, NEW = "aa", "bb"
CODES = {"good": 0, "bad": 3, "unsigned": 65, "no registry": 75, "broken": 70}
RUN_S = 5.0


class KilledError(BaseException):
    """kill -9 of the driver."""


class World:
    """Head and devices; each device's roll-out takes some seconds and ends as is said.

    Args:
        outcomes: how it ends, by device: one of `CODES`, ``lost``, or ``off`` for one that is not
            there at all.
        at_once: to be held.
        canary: to be held.
    """

    def __init__(self, outcomes: Mapping[str, str], canary: int = 1, at_once: int = 1) -> None:
        self.now = 0.0
        self.outcomes = dict(outcomes)
        self.config = FleetConfig(token_file="t", devices={name: Device() for name in outcomes})
        self.members = {name: Member(name, None) for name in outcomes}  # type: ignore[arg-type]
        self.serves = dict.fromkeys(outcomes, OLD)
        self.runs: dict[str, tuple[set[str], Report, float]] = {}
        self.started: list[str] = []
        self.gone: set[str] = set()
        self.accepted: frozenset[str] = frozenset()
        self.holder, self.held_until = "", 0.0
        self.canary, self.at_once = canary, at_once
        for member in self.members.values():  # also what is off was seen before
            member.saw(_facts(OLD))
        self.calls = 0
        self.dies_at: int | None = None
        self.may_refuse = False

    # The driver's clock.

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for name, (drivers, report, ends) in self.runs.items():
            if report.code is None and self.now >= ends:
                outcome = self.outcomes[name]
                if outcome == "lost":
                    self.gone.add(name)
                    continue
                changed = self.serves[name] != NEW
                code = CODES[outcome] if changed else 0
                if code == 0:
                    self.serves[name] = NEW
                ended = Report(report.run, report.order, code, changed, outcome)
                self.runs[name] = (drivers, ended, ends)

    def _call(self) -> None:
        self.calls += 1
        if self.dies_at is not None and self.calls >= self.dies_at:
            raise KilledError

    def running(self) -> set[str]:
        return {n for n, (_, report, _) in self.runs.items() if report.code is None}

    def is_off(self, name: str) -> bool:
        return name in self.gone or self.outcomes[name] == "off"

    # What a driver asks.

    def status(self) -> Mapping[str, Any]:
        self._call()
        for name, member in self.members.items():
            if self.is_off(name):
                member.lose("silent")
            else:
                member.saw(_facts(self.serves[name]))
        judge(self.members.values(), self.config, self.accepted)
        devices = {name: member.status() for name, member in self.members.items()}
        # No bundle of the roll-out may put a device out, neither the new one nor the old.
        assert (
            self.may_refuse
            or not self.accepted
            or "refused" not in {d["state"] for d in devices.values()}
        )
        return {"accepted": sorted(self.accepted), "devices": devices}

    def hold(self, driver: str, hashes: Sequence[str]) -> bool:
        self._call()
        if driver != self.holder and self.now < self.held_until:
            return False
        self.holder, self.held_until = driver, self.now + LEASE_S
        self.accepted = frozenset(hashes)
        return True

    def release(self, driver: str, hashes: Sequence[str]) -> None:
        self._call()
        if driver == self.holder:
            self.held_until, self.accepted = 0.0, frozenset(hashes)

    def look(self, name: str) -> Report | None:
        self._call()
        if self.is_off(name):
            raise LostError("off")
        return self.runs[name][1] if name in self.runs else None

    def roll_out(self, name: str, driver: str, order: Order) -> Report:
        self._call()
        assert driver == self.holder
        if self.is_off(name):
            raise LostError("off")
        if name in self.runs:
            drivers, report, _ = self.runs[name]
            if report.code is None:
                drivers.add(driver)
            if driver in drivers:
                return report
        self._begin(name, driver, order)
        return self.runs[name][1]

    def _begin(self, name: str, driver: str, order: Order) -> None:
        others = self.running() - self.gone
        assert len(others) < self.at_once, "two waves at once"
        have = {n for n, serves in self.serves.items() if serves == NEW}
        assert len(have) >= self.canary or len(others - have) < self.canary, "no canary first"
        ready = {n for n in self.members if not self.is_off(n)} - others - {name}
        assert ready, "nobody answers meanwhile"
        ended = [report.code for mine, report, _ in self.runs.values() if driver in mine]
        assert not any(ended), "went on after a device had failed"
        self.started.append(name)
        self.runs[name] = ({driver}, Report(str(len(self.started)), order), self.now + RUN_S)


def _facts(sha256: str) -> Facts:
    model = Model(sha256, 1, 1, 1, "cpu")
    return Facts(edge.__version__, edge.__version__, "x", {"r1": model})


def driver(world: World, order: Order = ORDER, **options: Any) -> Driver:
    return Driver(
        world,
        world.outcomes,
        order,
        NEW,
        canary=world.canary,
        at_once=world.at_once,
        clock=lambda: world.now,
        sleep=world.sleep,
        **options,
    )


def kill_while_running(world: World) -> None:
    """Start a driver, and kill it once a device rolls out."""

    def told(state: FleetRollout) -> None:
        if world.running() or state.where("running"):
            world.dies_at = world.calls + 4

    with pytest.raises(KilledError):
        driver(world, told=told).run()
    world.dies_at = None


def test_one_by_one_and_all_have_it():
    world = World(dict.fromkeys("abc", "good"))
    seen: list[list[str]] = []
    done = driver(world, told=lambda state: seen.append(state.where("running"))).run()
    assert done.where("new") == ["a", "b", "c"] == world.started
    assert max(map(len, seen)) == 1
    assert world.accepted == frozenset()  # the majority's rule counts again
    again = driver(world).run()
    assert again.where("unchanged") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("outcome", "kind", "code"),
    [
        ("bad", GateError, 3),
        ("unsigned", BundleError, 65),
        ("no registry", RegistryError, 75),
        ("broken", BackendError, 70),
        ("lost", DeadlineError, 75),
    ],
)
def test_what_the_canary_does_not_keep_nobody_else_sees(
    outcome: str, kind: type[EdgeError], code: int
):
    world = World({"a": outcome, "b": "good", "c": "good"}, at_once=2)
    with pytest.raises(kind, match=r"a \(canary\): .*not touched b c") as caught:
        driver(world).run()
    assert caught.value.exit_code == code
    assert world.started == ["a"]
    assert set(world.serves.values()) == {OLD}
    if outcome == "bad":  # it is certain that nobody has the new one
        assert world.accepted == {OLD}


def test_a_later_one_that_rejects_it_stops_the_rest_and_both_bundles_serve_on():
    world = World({"a": "good", "b": "bad", "c": "good", "d": "good"})
    with pytest.raises(GateError, match="the bundle is on a, the old one is on b, not touched c d"):
        driver(world).run()
    assert world.accepted == {OLD, NEW}
    assert {d["state"] for d in world.status()["devices"].values()} == {"ready"}


def test_a_device_that_is_off_is_left_out_and_catches_up():
    world = World({"a": "off", "b": "good", "c": "good"})
    done = driver(world).run()
    assert (done.where("off"), done.where("new")) == (["a"], ["b", "c"])
    assert done.devices["b"].canary
    world.outcomes["a"] = "good"
    done = driver(world).run()
    assert (done.where("new"), done.where("unchanged")) == (["a"], ["b", "c"])
    assert world.accepted == frozenset()


def test_a_device_that_the_head_refuses_for_its_old_bundle_is_brought_in():
    world = World(dict.fromkeys("abc", "good"))
    world.may_refuse = True
    world.serves.update(b=NEW, c=NEW)  # while this was off, and the head has been made anew since
    assert world.status()["devices"]["a"]["state"] == "refused"
    assert driver(world).run().where("new") == ["a"]
    assert world.status()["devices"]["a"]["state"] == "ready"


def test_a_device_that_the_head_does_not_know_is_said_before_anything_is_begun():
    world = World({"one": "good", "two": "good"})
    world.members.pop("two")
    with pytest.raises(ConfigError, match="which does not have two; run edge-llm fleet up"):
        driver(world).run()
    assert not world.runs


def test_nobody_is_on_or_nobody_would_be_left():
    with pytest.raises(DeadlineError, match="no device of the fleet is on"):
        driver(World(dict.fromkeys("ab", "off"))).run()
    alone = World({"a": "good", "b": "off"})
    with pytest.raises(DeadlineError, match=r"no other device is ready .*edge-llm bundle rollout"):
        driver(alone).run()
    assert alone.started == []


def test_a_killed_driver_holds_the_fleet_for_a_lease_and_a_live_one_for_ever():
    world = World(dict.fromkeys("abc", "good"))
    kill_while_running(world)
    assert world.running() == {"a"}
    began = world.now
    done = driver(world).run()  # it joins what runs
    assert done.where("new", "unchanged") == ["a", "b", "c"]
    assert world.started.count("b") == world.started.count("c") == 1
    assert world.now - began >= LEASE_S - RUN_S
    world.holder, world.held_until = "other", world.now + 1e9
    with pytest.raises(ConfigError, match="another roll-out of this fleet is at work"):
        driver(world).run()


def test_another_content_waits_until_devices_are_done():
    world = World(dict.fromkeys("abc", "good"))
    kill_while_running(world)
    world.runs["a"] = (*world.runs["a"][:2], 1e9)
    other = Order(f"registry.example.com/r1@sha256:{'2' * 64}")
    with pytest.raises(ConfigError, match=f"a is being brought to {ORDER.reference}"):
        driver(world, other).run()
    assert world.started == ["a"]


def test_a_device_that_ends_well_and_serves_the_old_bundle_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
):
    world = World(dict.fromkeys("abc", "good"))
    real = world.status

    def status() -> Mapping[str, Any]:
        world.serves["a"] = OLD  # no --reload in its command
        assert not world.started or world.held_until > world.now
        return real()

    monkeypatch.setattr(world, "status", status)
    with pytest.raises(BackendError, match=f"after {PATIENCE_S:g} s the head sees it .*--reload"):
        driver(world).run()
    assert world.started == ["a"]


def test_an_agent_that_is_lost_again_and_again_is_no_reason_to_go_on_for_ever(
    monkeypatch: pytest.MonkeyPatch,
):
    world = World(dict.fromkeys("abc", "good"))
    real = world.roll_out

    def forgetful(name: str, driver: str, order: Order) -> Report:
        world.runs.pop(name, None)
        return real(name, driver, order)

    monkeypatch.setattr(world, "roll_out", forgetful)
    with pytest.raises(BackendError, match="lost its agent 3 times"):
        driver(world).run()
    assert set(world.started) == {"a"}


def test_a_head_that_is_made_again_meanwhile_is_told_again(monkeypatch: pytest.MonkeyPatch):
    world = World(dict.fromkeys("abc", "good"))
    real, failing = world.hold, [3, 4, 5]

    def hold(driver: str, hashes: Sequence[str]) -> bool:
        if failing and world.now >= failing[0]:
            failing.pop(0)
            world.accepted, world.holder, world.held_until = frozenset(), "", 0.0
            raise BackendError("the head does not answer")
        return real(driver, hashes)

    monkeypatch.setattr(world, "hold", hold)
    assert len(driver(world).run().where("new")) == 3
    assert not failing


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(["good"] * 5 + ["bad", "broken", "lost", "off"]), min_size=2, max_size=6
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.integers(1, 60), max_size=3),
)
def test_whatever_happens(outcomes: list[str], canary: int, at_once: int, kills: list[int]):
    """`World` checks every start; here, that calling again ends where one call would."""
    world = World(dict(zip("abcdef", outcomes, strict=False)), canary, at_once)
    for kill in kills:
        world.dies_at = world.calls + kill
        with contextlib.suppress(KilledError, EdgeError):
            driver(world).run()
    world.dies_at = None
    try:
        done = driver(world).run()
    except EdgeError:
        on = [name for name, outcome in world.outcomes.items() if not world.is_off(name)]
        assert len(on) < 2 or set(outcomes) & {"bad", "broken", "lost"}
    else:
        assert isinstance(done, FleetRollout)
        assert {done.devices[n].state for n in done.devices} <= {"new", "unchanged", "off"}
        for name in done.where("new", "unchanged"):
            assert world.serves[name] == NEW
    # What is good and put right later always ends with one bundle everywhere.
    world.gone.clear()
    world.runs = {n: run for n, run in world.runs.items() if run[1].code is not None}
    world.outcomes = dict.fromkeys(world.outcomes, "good")
    assert not driver(world).run().where("off")
    assert set(world.serves.values()) == {NEW}
    assert world.accepted == frozenset()


# --------------------------------------------------------------------------- the device's process


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "command.py"
    path.write_text(f"import json, os, sys, time\n{text}")
    return [sys.executable, str(path)]


def ended(errand: Errand) -> Report:
    deadline = time.monotonic() + 30
    while (report := errand.look()) is not None and report.code is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert report is not None
    return report


def test_a_device_runs_its_command_once_for_all_who_ask(tmp_path: Path):
    command = script(
        tmp_path,
        "sys.stderr.write('half way\\n'); sys.stderr.flush()\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
        f"print(json.dumps(dict(digest='{DIGEST}', changed=True, notes=['so'])))\n",
    )
    errand = Errand(command)
    first = errand.ask("one", ORDER)
    assert errand.ask("two", ORDER).run == first.run
    with pytest.raises(ConfigError, match="is being brought to"):
        errand.ask("two", Order(ORDER.reference, watch_s=1))
    (tmp_path / "go").touch()
    assert ended(errand) == Report(first.run, ORDER, 0, True, "so")
    assert errand.ask("two", ORDER).code == 0  # who joined it hears its end
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    third = errand.ask("three", ORDER)
    assert third.run != first.run
    ended(errand)
    call = (tmp_path / "calls").read_text().splitlines()[0]
    assert call == f'["{ORDER.reference}", "--gate", "golden", "--watch-s", "600", "--json"]'


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("sys.exit('x\\nedge-llm: error: worse\\nby far')", 1, "worse\nby far"),
        ("print('{}')", 70, "printed no JSON"),
        ("print(json.dumps(dict(digest='sha256:0', changed=True)))", 70, "brought it to sha256:0"),
        ("os.kill(os.getpid(), 9)", -9, "ended by signal 9"),
    ],
)
def test_how_a_command_ended_is_told(tmp_path: Path, text: str, code: int, said: str):
    errand = Errand(script(tmp_path, text))
    errand.ask("one", ORDER)
    report = ended(errand)
    assert report.code == code
    assert said in report.said


def test_what_is_no_order_starts_nothing(tmp_path: Path):
    errand = Errand(script(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')"))
    with pytest.raises(ConfigError, match="is no reference"):
        errand.ask("one", Order("--reload=reboot"))
    with pytest.raises(ConfigError, match="has no digest"):
        errand.ask("one", Order("registry.example.com/r1:v1"))
    with pytest.raises(ConfigError, match="names no command"):
        Errand(None).ask("one", ORDER)
    with pytest.raises(ConfigError, match="no command 'edge-llm-none'"):
        Errand(["edge-llm-none"]).ask("one", ORDER)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canary": 0}, "canary is 0; use 1 or more"),
        ({"at_once": 0}, "at_once is 0"),
        ({"gate": "none at all"}, "gate is 'none at all'; use one of golden, none"),
        ({"watch_s": -1}, "watch_s is -1"),
        ({}, r"fleet.toml names no rollout for a; write one for all"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("edge_fleet.devices.cluster.connect", lambda _: None)
    fleet = Fleet(FleetConfig(token_file="t", devices={"a": Device()}))
    with pytest.raises(ConfigError, match=message):
        fleet.rollout("registry.example.com/r1:v1", **options)
