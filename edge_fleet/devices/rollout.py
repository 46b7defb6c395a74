"""Decides which device rolls a bundle out next, and when to stop.

Each device does it by itself (`errand`) and is the only one that knows its state. The driver
keeps nothing: killed and called again, it asks the devices.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from edge.errors import (
    EXIT_GATE_MISSED,
    BackendError,
    BundleError,
    ConfigError,
    DeadlineError,
    EdgeError,
    GateError,
    RegistryError,
)

from .errand import Order, Report
from .members import LostError

POLL_S = 1.0
LEASE_S = 15.0
"""How long the head waits for a driver that says nothing before another one may go on."""
PATIENCE_S = 60.0
"""For a device that does not answer, or is not served yet, and for the head."""
_MAX_RUNS = 3  # of one device, where the agent that started them was lost
_ON = ("ready", "refused")

State = Literal["waiting", "running", "new", "unchanged", "rejected", "failed", "lost", "off"]
_HAVE: tuple[State, ...] = ("new", "unchanged")
_T = TypeVar("_T")


class DeviceRollout(msgspec.Struct):
    """Where one device is.

    Attributes:
        state: ``new`` and ``unchanged`` have the bundle; ``rejected`` serves its old one;
            ``lost`` did not answer any more; ``off`` was not asked.
        said: its own words.
        canary: whether others waited for it.
        code: exit code of its own roll-out.
    """

    state: State = "waiting"
    said: str = ""
    canary: bool = False
    code: int | None = None


class FleetRollout(msgspec.Struct):
    """A roll-out of a fleet.

    Attributes:
        reference: the content, by digest.
        devices: by name, in the order of the file.
    """

    reference: str
    devices: dict[str, DeviceRollout]

    def where(self, *states: State) -> list[str]:
        """Return the devices in these states."""
        return [name for name, device in self.devices.items() if device.state in states]


class Crew(Protocol):
    """The head and the devices, as a driver needs them."""

    def status(self) -> Mapping[str, Any]:
        """Return `FleetHead.status`, or raise `BackendError`."""
        ...

    def hold(self, driver: str, hashes: Sequence[str]) -> bool:
        """Have the head accept these bundles; False where another driver is at work."""
        ...

    def release(self, driver: str, hashes: Sequence[str]) -> None:
        """Let another driver be; the head accepts these bundles until it is told otherwise."""
        ...

    def roll_out(self, name: str, driver: str, order: Order) -> Report:
        """Call `Errand.ask` of a device, or raise `LostError`."""
        ...

    def look(self, name: str) -> Report | None:
        """Call `Errand.look` of a device, or raise `LostError`."""
        ...


class Driver:
    """Rolls one content out to a fleet.

    Args:
        crew: head and devices.
        names: the devices, in the order in which they are asked.
        order: what to roll out.
        sha256: of the bundle's manifest, as devices name what they serve.
        canary: devices that must end well before any other is touched.
        at_once: devices that roll out at the same time.
        told: is called with the whole state at each change of it.
        clock, sleep: monotonic seconds, and the pause between two looks.
    """

    def __init__(
        self,
        crew: Crew,
        names: Iterable[str],
        order: Order,
        sha256: str,
        *,
        canary: int = 1,
        at_once: int = 1,
        told: Callable[[FleetRollout], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._crew = crew
        self._order = order
        self._sha256 = sha256
        self._canary = canary
        self._at_once = at_once
        self._told = told
        self._clock = clock
        self._sleep = sleep
        self._name = uuid.uuid4().hex
        self._hashes: list[str] = [sha256]
        self._accepted: Sequence[str] = ()
        self._served: set[str] = set()
        self.state = FleetRollout(order.reference, {name: DeviceRollout() for name in names})

    def run(self) -> FleetRollout:
        """Bring every device that is on to the bundle; returns which ones were off.

        Raises:
            GateError: a device has rejected it; no further one was asked.
            BundleError, RegistryError, BackendError: a device could not do it, with code 65, 75
                or any other; no further one was asked.
            DeadlineError: a device was lost, or no other one is ready to answer meanwhile.
            ConfigError: another roll-out is at work, a device's command cannot be started, or the
                head does not know a device.
        """
        status = self._status()
        if strange := [name for name in self.state.devices if name not in status]:
            raise ConfigError(
                f"the fleet was brought up with another fleet.toml, which does not have "
                f"{', '.join(strange)}; run edge-llm fleet up on the head"
            )
        # What an earlier call has left on a device that is off now still counts when it is back.
        known = set(self._accepted)
        served = (
            _hashes(device) if device["state"] == "ready" else _hashes(device) & known
            for device in status.values()
        )
        self._hashes = sorted({self._sha256}.union(*served))
        self._wait(self._hold, LEASE_S + 5, _busy)
        try:
            self._go(status)
        finally:
            self._release()
        return self.state

    # ------------------------------------------------------------------------------- waves

    def _go(self, status: Mapping[str, Any]) -> None:
        if not any(status[name]["state"] in _ON for name in self.state.devices):
            raise DeadlineError("no device of the fleet is on; look at edge-llm fleet status")
        # What a driver that was killed has left running comes first, or two waves would run.
        self._wave(self._joined(status), status)
        while True:
            wave, status = self._wait(self._next, PATIENCE_S, self._nobody_ready)
            if not wave:
                break
            self._wave(wave, status)
        for name in self.state.where("waiting"):
            device = status[name]
            self._set(name, "off", device["reason"] or device["state"])

    def _joined(self, status: Mapping[str, Any]) -> list[str]:
        found = []
        for name in self.state.devices:
            if status[name]["state"] == "absent":
                continue
            self._beat()
            try:
                report = self._crew.look(name)
            except LostError:
                continue  # its turn will show whether it is there
            if report is None or report.code is not None:
                continue
            if report.order != self._order:
                raise ConfigError(
                    f"{name} is being brought to {report.order.reference} (gate "
                    f"{report.order.gate}, {report.order.watch_s:g} s) by a roll-out that was not "
                    "ended; wait for it, or call that one again"
                )
            found.append(name)
        return found

    def _next(self) -> tuple[list[str], Mapping[str, Any]] | None:
        """Choose the next wave; none is left, or None while it must wait for a ready device."""
        self._beat()
        status = self._status()
        missing = self._canary - len(self.state.where(*_HAVE))
        most = min(self._at_once, missing) if missing > 0 else self._at_once
        ready = {name for name in status if status[name]["state"] == "ready"}
        on = [name for name in self.state.where("waiting") if status[name]["state"] in _ON]
        wave: list[str] = []
        for name in on[:most]:
            if not ready - {*wave, name}:
                break
            wave.append(name)
        for name in wave:
            self.state.devices[name].canary = missing > 0
        return None if on and not wave else (wave, status)

    def _wave(self, wave: list[str], status: Mapping[str, Any]) -> None:
        """Let devices roll out at once; raises, after the last has ended, if one did not do it."""
        for name in wave:
            self._set(name, "running", "")
        running = {name: _Watched(self._clock()) for name in wave}
        while running:
            for name, watched in tuple(running.items()):
                if self._ended(name, watched):
                    del running[name]
            if running:
                self._sleep(POLL_S)
        for name in wave:
            if self.state.devices[name].state not in _HAVE:
                raise self._stopped(name)
        for name in wave:
            self._confirm(name, status[name]["state"] == "ready")

    def _ended(self, name: str, watched: _Watched) -> bool:
        """Ask a device once; whether there is nothing more to wait for."""
        self._beat()
        try:
            report = self._crew.roll_out(name, self._name, self._order)
        except LostError as error:
            if self._clock() - watched.seen < PATIENCE_S:
                return False
            self._set(name, "lost", f"it does not answer for {PATIENCE_S:g} s: {error}")
            return True
        except ConfigError as error:
            self._set(name, "failed", str(error), error.exit_code)
            return True
        watched.seen = self._clock()
        watched.runs.add(report.run)
        if len(watched.runs) > _MAX_RUNS:
            self._set(name, "failed", f"Ray lost its agent {_MAX_RUNS} times meanwhile", 70)
        elif report.code is None:
            self._set(name, "running", report.said)
            return False
        elif report.code == 0:
            self._set(name, "new" if report.changed else "unchanged", report.said, 0)
        elif report.code == EXIT_GATE_MISSED:
            self._set(name, "rejected", report.said, report.code)
        else:
            self._set(name, "failed", report.said, report.code)
        return True

    def _confirm(self, name: str, was_ready: bool) -> None:
        """Wait until the head sees the bundle served there, and sends requests as before."""
        seen: dict[str, Any] = {}

        def served() -> bool | None:
            self._beat()
            seen.update(self._status()[name])
            fits = seen["state"] == "ready" or not was_ready
            return True if fits and self._sha256 in _hashes(seen) else None

        def not_served() -> EdgeError:
            said = (
                f"its roll-out ended well, and after {PATIENCE_S:g} s the head sees it "
                f"{seen['state']} ({seen['reason'] or 'no reason'}) with "
                f"{', '.join(hash_[:12] for hash_ in sorted(_hashes(seen))) or 'no bundle'} "
                f"instead of {self._sha256[:12]}; does its rollout have --server and --reload, and "
                "is its link the one that the service's settings name?"
            )
            self._set(name, "failed", said, 70)
            return self._stopped(name)

        self._wait(served, PATIENCE_S, not_served)

    # ------------------------------------------------------------------------------- the head

    def _status(self) -> Mapping[str, Any]:
        """Return the devices, as the head sees them."""
        status = self._patient(self._crew.status)
        self._accepted = status["accepted"]
        devices: Mapping[str, Any] = status["devices"]
        self._served = set[str]().union(*(_hashes(device) for device in devices.values()))
        return devices

    def _hold(self) -> bool | None:
        return self._patient(lambda: self._crew.hold(self._name, self._hashes)) or None

    def _beat(self) -> None:
        if not self._hold():
            raise _busy()

    def _patient(self, call: Callable[[], _T]) -> _T:
        """Call the head; Ray makes it again where it died."""
        deadline = self._clock() + PATIENCE_S
        while True:
            try:
                return call()
            except BackendError:
                if self._clock() > deadline:
                    raise
                self._sleep(POLL_S)

    def _release(self) -> None:
        """Let both bundles serve on until a call has brought every device to one."""
        keep: Sequence[str] = self._hashes
        if len(self.state.where(*_HAVE)) == len(self.state.devices):
            keep = ()
        elif self._sha256 not in self._served and not self.state.where(
            *_HAVE, "running", "lost", "failed"
        ):
            keep = [hash_ for hash_ in keep if hash_ != self._sha256]
        try:
            self._crew.release(self._name, keep)
        except BackendError:
            return  # the lease ends by itself, and the head goes on accepting both

    def _wait(
        self, look: Callable[[], _T | None], timeout_s: float, late: Callable[[], EdgeError]
    ) -> _T:
        deadline = self._clock() + timeout_s
        while (found := look()) is None:
            if self._clock() > deadline:
                raise late()
            self._sleep(POLL_S)
        return found

    # ------------------------------------------------------------------------------- words

    def _set(self, name: str, state: State, said: str, code: int | None = None) -> None:
        device = self.state.devices[name]
        if (device.state, device.said) == (state, said):
            return
        device.state, device.said, device.code = state, said, code
        self._told(self.state)

    def _nobody_ready(self) -> EdgeError:
        return DeadlineError(
            "no other device is ready to answer while the next one rolls out; "
            f"{self._summary()}; look at edge-llm fleet status, or roll out on the device itself: "
            "edge-llm bundle rollout"
        )

    def _stopped(self, name: str) -> EdgeError:
        device = self.state.devices[name]
        what = f"{name}{' (canary)' if device.canary else ''}"
        end = f"{what}: {device.said}; {self._summary()}"
        if device.state == "rejected":
            return GateError(
                f"stopped, since a device rejected {self.state.reference}. {end}. Roll out a "
                "better bundle, which also brings back those that have this one",
                {"devices": msgspec.to_builtins(self.state.devices)},
            )
        if device.state == "lost":
            return DeadlineError(
                f"stopped, since a device was lost. {end}. Call again when it is on"
            )
        kind = {64: ConfigError, 65: BundleError, 75: RegistryError}.get(
            device.code or 70, BackendError
        )
        return kind(f"stopped, since a device failed with code {device.code}. {end}. Call again")

    def _summary(self) -> str:
        groups = [
            ("the bundle is on", self.state.where(*_HAVE)),
            ("the old one is on", self.state.where("rejected")),
            ("uncertain", self.state.where("running", "failed", "lost")),
            ("not touched", self.state.where("waiting", "off")),
        ]
        return ", ".join(f"{text} {' '.join(names)}" for text, names in groups if names)


class _Watched:
    """A device that rolls out: when it answered last, and which runs of it were seen."""

    def __init__(self, now: float) -> None:
        self.seen = now
        self.runs: set[str] = set()


def _hashes(device: Mapping[str, Any]) -> set[str]:
    return {model["sha256"] for model in device["models"].values()}


def _busy() -> EdgeError:
    return ConfigError("another roll-out of this fleet is at work; wait until it has ended")
