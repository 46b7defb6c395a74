"""A fleet of twenty devices on loopback: waves, failures, replays, and what is lost or repeated."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn

from edge.bundle import trust
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    EdgeError,
    GateError,
    IntegrityError,
    RegistryError,
)
from edge_fleet.registry.reference import Reference
from edge_fleet.rollout.journal import Place
from edge_fleet.waves import progress as progresses
from edge_fleet.waves.device import Poll, Receiver
from edge_fleet.waves.progress import Progress
from edge_fleet.waves.receiver import State, make_app
from edge_fleet.waves.wanted import Report, Wanted, seal, unseal
from edge_make.atomic_swap import ORIGIN_NAME
from edge_make.key_file import make_key as make_device_key
from tests.makers.keys import Key, make_key
from tests.ports import free_port

pytestmark = pytest.mark.live

ORIGIN = b"the registry's manifest of the new bundle"
DIGEST = f"sha256:{hashlib.sha256(ORIGIN).hexdigest()}"
REFERENCE = f"registry.example.com/models/r1@{DIGEST}"
NAMES = [f"orin-{n:02}" for n in range(20)]


@dataclass
class Scripted:
    """A device whose roll-out is played: its link, journal and way back are real."""

    name: str
    root: Path
    url: str
    key: str
    trusted: Path
    fails: EdgeError | None = None
    begun: int = 0
    hour: int = 12
    told: list[str] = field(default_factory=list)

    @property
    def link(self) -> Path:
        return self.root / "r1"

    def make(self) -> None:
        (self.root / "r1-first").mkdir(parents=True)
        self.link.symlink_to("r1-first")

    def roll_out(self, reference: Reference) -> None:
        self.begun += 1
        assert str(reference) == REFERENCE
        if self.fails is not None:
            raise self.fails
        place = Place(self.link)
        with place.locked():
            journal = place.read()
            journal.digest, journal.step = DIGEST, "done"
            journal.new, journal.old = f"r1-{DIGEST[7:19]}", place.current
            place.path(journal.new).mkdir()
            (place.path(journal.new) / ORIGIN_NAME).write_bytes(ORIGIN)
            place.point(journal.new)
            place.write(journal)

    def poll(self) -> Report | None:
        now = datetime(2026, 12, 1, self.hour, 30)
        receiver = Receiver(self.url, self.key)
        found = Poll(receiver, self.link, self.roll_out, trusted_keys=self.trusted, now=lambda: now)
        try:
            return found.run(self.told.append)
        except EdgeError as error:
            self.told.append(str(error))
            return None


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.key = make_key()
        self.trusted = folder / "trusted-keys"
        self.trusted.write_text(self.key.public_text)
        self.folder = folder / "state"
        self.folder.mkdir()
        keys = {name: make_device_key() for name in NAMES}
        file = self.folder / "device-keys"
        file.write_text("".join(f"{name}:{key}\n" for name, key in keys.items()))
        file.chmod(0o600)
        self.state = State(self.folder)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.devices = {
            name: Scripted(name, folder / name, self.url, key, self.trusted)
            for name, key in keys.items()
        }
        for device in self.devices.values():
            device.make()
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(make_app(self.state), port=self.port, log_config=None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def want(self, number: int = 1, key: Key | None = None, **changes: Any) -> Wanted:
        wanted = Wanted(number, REFERENCE, **changes)
        self.state.publish(seal(wanted, key or self.key))
        return wanted

    def poll(self) -> None:
        """Let every device look once, in the order of names."""
        for device in self.devices.values():
            device.poll()

    @property
    def progress(self) -> Progress:
        return self.state.progress()

    @property
    def having(self) -> list[str]:
        return [name for name, each in self.devices.items() if each.link.readlink() != FIRST]


FIRST = Path("r1-first")


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    found = Fleet(tmp_path)
    yield found
    found.stop()


def test_a_bundle_comes_to_one_device_then_5_percent_25_percent_and_all(fleet: Fleet):
    """Twenty devices: 5 % of them is the same one; each knows its turn by itself."""
    wanted = fleet.want()
    order = sorted(NAMES, key=wanted.position)
    sizes = []
    for _ in range(6):
        before = set(fleet.having)
        fleet.poll()
        sizes.append(len(fleet.having))
        # Whoever is first in the order has begun first.
        assert set(fleet.having) == set(order[: len(fleet.having)])
        assert before <= set(fleet.having)
    # Within a round of polls a wave may open for those who poll after the one that ended the last.
    assert sizes[0] >= 1
    assert sizes[-1] == 20
    assert any(size < 20 for size in sizes)
    assert fleet.progress.done
    assert {each.begun for each in fleet.devices.values()} == {1}
    assert all(report and report.running == DIGEST for report in fleet.progress.devices.values())


def test_a_wave_waits_until_each_of_its_devices_has_ended(fleet: Fleet):
    wanted = fleet.want(waves=("2", "25%", "100%"))
    order = [fleet.devices[name] for name in sorted(NAMES, key=wanted.position)]
    for device in order[2:]:
        assert device.poll() is not None
        assert not device.begun
    assert order[0].poll() is not None
    order[2].poll()
    assert (fleet.progress.wave, fleet.having) == (1, [order[0].name])
    assert order[1].poll() is not None
    assert fleet.progress.wave == 2
    turns = (order[2], order[5], order[3], order[5], order[4], order[5])
    reports = [device.poll() for device in turns]
    found = [report.outcome for report in reports if report]
    assert found == ["has", "waiting", "has", "waiting", "has", "has"]


def test_one_bad_bundle_stops_at_the_first_wave(fleet: Fleet):
    wanted = fleet.want()
    for device in fleet.devices.values():
        device.fails = GateError("perplexity is 9 times that of r1-first", {})
    for _ in range(4):
        fleet.poll()
    first = min(NAMES, key=wanted.position)
    assert [name for name, each in fleet.devices.items() if each.begun] == [first]
    assert fleet.having == []
    found = fleet.progress
    assert found.stopped == f"1 failed, at most 0 may: {first}"
    report = found.devices[first]
    assert report is not None
    assert (report.outcome, report.code) == ("rejected", 3)
    assert "perplexity is 9 times" in report.reason


def test_nobody_begins_once_too_many_have_failed_though_others_have_the_bundle(fleet: Fleet):
    wanted = fleet.want(waves=("5", "100%"))
    order = sorted(NAMES, key=wanted.position)
    fleet.devices[order[0]].fails = BackendError("no build")
    for name in (*order[1:5], order[0]):
        fleet.devices[name].poll()
    fleet.poll()
    assert sorted(fleet.having) == sorted(order[1:5])
    assert fleet.progress.stopped == f"1 failed, at most 0 may: {order[0]}"
    assert fleet.devices[order[0]].begun == 1
    # The one that failed is said to have failed, though it only waits since then.
    report = fleet.progress.devices[order[0]]
    assert report is not None
    assert report.reason == "no build"


def test_as_many_may_fail_as_the_vendor_says(fleet: Fleet):
    wanted = fleet.want(waves=("5", "100%"), max_failed=2)
    order = sorted(NAMES, key=wanted.position)
    for name in order[:2]:
        fleet.devices[name].fails = BackendError("no build")
    fleet.poll()
    fleet.poll()
    assert len(fleet.having) == 18
    assert not fleet.progress.stopped


def test_a_device_that_is_off_does_not_block_a_wave_and_catches_up(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
):
    wanted = fleet.want(waves=("3", "100%"))
    order = [fleet.devices[name] for name in sorted(NAMES, key=wanted.position)]
    order[0].poll()
    order[2].poll()
    assert fleet.progress.wave == 1  # the second one has not polled, and may be about to
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + progresses.SILENT_S + 9)
    assert fleet.progress.wave == 1  # nobody has: that is the receiver's fault
    order[0].poll()
    assert fleet.progress.wave == 2
    order[1].fails = RegistryError("the registry does not answer")
    order[1].poll()
    assert fleet.progress.wave == 1  # now it is there, and has not ended
    assert order[1].begun
    order[1].fails = None
    order[1].poll()
    assert fleet.progress.wave == 2


def test_an_older_wanted_state_is_refused_and_a_forged_one_too(fleet: Fleet):
    fleet.want(7)
    device = fleet.devices[NAMES[0]]
    assert device.poll() is not None
    fleet.want(6)
    device.poll()
    assert "hands out the wanted state 6, and 7 was here" in device.told[-1]
    fleet.want(8, key=make_key())
    device.poll()
    assert "none of the trusted ones" in device.told[-1]
    # One character of what was signed.
    envelope = seal(Wanted(9, REFERENCE), fleet.key)
    forged = msgspec.structs.replace(envelope, wanted=envelope.wanted.replace("5%", "9%"))
    with pytest.raises(IntegrityError, match="is refused"):
        unseal(forged, "here", fleet.trusted)
    with pytest.raises(BundleError, match="no wanted state"):
        unseal(msgspec.structs.replace(envelope, wanted="{}"), "here", None)
    assert device.poll() is None
    assert Place(device.link).read().wanted == 7


def test_a_key_that_is_bound_to_other_names_wants_nothing(fleet: Fleet):
    fleet.trusted.write_text(f"names: other/*\n{fleet.key.public_text}")
    fleet.want()
    fleet.poll()
    assert fleet.having == []
    assert "is not trusted for models/r1" in fleet.devices[NAMES[0]].told[-1]


@pytest.mark.parametrize(
    ("window", "hours"), [("22-6", {22, 23, 0, 5}), ("9-17", {9, 12, 16}), ("", set(range(24)))]
)
def test_a_window_is_of_local_hours_and_may_span_midnight(window: str, hours: set[int]):
    wanted = Wanted(1, REFERENCE, window=window)
    wanted.check()
    for hour in (0, 5, 6, 9, 12, 16, 17, 21, 22, 23):
        assert wanted.is_open_at(datetime(2026, 12, 1, hour, 59)) == (hour in hours)


def test_a_device_begins_within_the_window_only(fleet: Fleet):
    wanted = fleet.want(window="1-4")
    first = fleet.devices[min(NAMES, key=wanted.position)]
    report = first.poll()
    assert report is not None
    assert (report.outcome, report.reason) == ("waiting", "it begins within the hours 1-4")
    first.hour = 3
    report = first.poll()
    assert report is not None
    assert report.outcome == "has"


def test_reports_that_are_lost_or_come_twice_or_late_change_nothing(fleet: Fleet):
    fleet.want(waves=("1", "100%"))
    late = Report(1, "failed", 1.0, 2.0, reason="an earlier try")
    new = Report(1, "has", 3.0, 4.0, DIGEST)
    for report in (new, late, new, late, Report(1, "waiting", 5.0, 6.0)):
        fleet.state.reports.add(NAMES[0], report)
    assert fleet.progress.devices[NAMES[0]] == new
    # The receiver is away while a device reports: the next poll makes the report again.
    device = fleet.devices[NAMES[1]]
    wanted = fleet.want(2, waves=("100%",))
    done = device.roll_out

    def losing(reference: Reference) -> None:
        done(reference)
        fleet.stop()

    device.roll_out = losing  # type: ignore[method-assign]
    assert device.poll() is not None
    assert "made again by the next poll" in device.told[-1]
    fleet.start()
    assert fleet.progress.devices[device.name] is None
    again = device.poll()
    assert again is not None
    assert (again.outcome, again.number, device.begun) == ("has", wanted.number, 1)
    assert fleet.progress.devices[device.name] == again


def test_all_go_back_at_once_and_nobody_takes_it_again(fleet: Fleet):
    fleet.want(1, waves=("100%",))
    for name in NAMES[:15]:
        fleet.devices[name].poll()
    assert len(fleet.having) == 15
    fleet.want(2, do="rollback", window="1-2")
    fleet.poll()
    fleet.poll()  # it is done already
    assert fleet.having == []
    assert fleet.progress.done
    assert {each.begun for each in fleet.devices.values()} == {0, 1}
    assert DIGEST in Place(fleet.devices[NAMES[0]].link).read().rejected


def test_a_device_speaks_for_itself_only(fleet: Fleet):
    fleet.want()
    thief = Receiver(fleet.url, fleet.devices[NAMES[3]].key)
    assert thief.wanted().device == NAMES[3]
    thief.report(Report(1, "has", 1.0, 2.0))
    assert [name for name, each in fleet.progress.devices.items() if each] == [NAMES[3]]
    with pytest.raises(ConfigError, match="401: the key is no device's"):
        Receiver(fleet.url, make_device_key()).wanted()
    with pytest.raises(ConfigError, match="would show the device's key"):
        Receiver("http://fleet.example.com", "k")
    with pytest.raises(ConfigError, match="413"):
        thief.report(Report(1, "has", 1.0, 2.0, reason="x" * 100_000))


def test_wrong_words_are_refused_before_they_are_signed(fleet: Fleet):
    for changes, message in (
        ({"waves": ("0",)}, "waves are '0'"),
        ({"waves": ()}, "waves are"),
        ({"waves": ("101%",)}, "waves are"),
        ({"window": "25-3"}, "window is"),
        ({"reference": "registry.example.com/r1:stable"}, "has no digest"),
        ({"max_failed": -1}, "max_failed"),
    ):
        wanted = msgspec.structs.replace(Wanted(1, REFERENCE), **changes)
        with pytest.raises(ConfigError, match=message):
            seal(wanted, fleet.key)


def test_a_device_that_is_killed_goes_on_with_the_next_poll(fleet: Fleet, tmp_path: Path):
    """The receiver has handed it its turn, so it is its turn again."""
    wanted = fleet.want()
    first = fleet.devices[min(NAMES, key=wanted.position)]
    program = (
        "import os, sys; from pathlib import Path\n"
        "from edge_fleet.waves.device import Poll, Receiver\n"
        "url, key, link, keys = sys.argv[1:]\n"
        "Poll(Receiver(url, key), Path(link), lambda _: os.kill(os.getpid(), 9),"
        " trusted_keys=Path(keys)).run(print)\n"
    )
    command = [sys.executable, "-c", program, fleet.url, first.key, first.link, fleet.trusted]
    died = subprocess.run([str(word) for word in command], check=False, env=os.environ)
    assert died.returncode == -9
    assert fleet.progress.devices[first.name] is None
    assert first.poll() is not None
    assert fleet.having == [first.name]
    assert fleet.progress.wave > 1
