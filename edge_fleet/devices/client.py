"""`Fleet`: what an operator may do with a fleet, from the head's machine or a device's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edge.errors import BackendError, ConfigError, DeadlineError
from edge_fleet.rollout import MAX_WATCH_S, WATCH_S

from . import cluster
from .config import FleetConfig, read_config
from .errand import Gate, Order
from .rollout import Driver, FleetRollout

if TYPE_CHECKING:
    from edge_fleet.registry.reference import Reference

    from .evaluation import FleetComputer, Seat

_POLL_S = 0.3


class Fleet:
    """A fleet that is up; close it, or use it in a ``with`` statement.

    Args:
        config: the fleet's file, read.
    """

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        cluster.connect(config)

    @classmethod
    def connect(cls, file: str | Path) -> Fleet:
        """Connect to a fleet by its file, on a machine that belongs to it.

        Raises:
            ConfigError: the file or the token cannot be used.
            BackendError: there is no Ray at the fleet's address, or it has another token.
            DependencyError: Ray is not installed.
        """
        return cls(read_config(Path(file)))

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave Ray; the fleet goes on."""
        import ray

        ray.shutdown()

    def deploy(self) -> None:
        """Start the endpoint, or renew what the file has changed; on the head's machine only.

        Raises:
            ConfigError: the head cannot use its keys, or not have its address.
        """
        from . import serving

        serving.deploy(self.config, cluster.drained_file(self.config))

    def status(self) -> dict[str, Any]:
        """Return the state of the head and of each device, as ``/stats`` of the head shows it.

        Raises:
            BackendError: the head does not answer.
        """
        status: dict[str, Any] = self._call("status")
        return status

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Wait until every device of the file is ready or refused; returns the state then.

        Devices that have not joined, or are not ready, by then are in it as they are.

        Raises:
            DeadlineError: the head itself did not start.
        """
        deadline = time.monotonic() + timeout_s
        status: dict[str, Any] | None = None
        while True:
            try:
                status = self.status()
            except BackendError as error:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"the head did not start within {timeout_s:g} s: {error}"
                    ) from error
            else:
                states = {device["state"] for device in status["devices"].values()}
                if states <= {"ready", "refused", "draining"} or time.monotonic() > deadline:
                    return status
            time.sleep(_POLL_S)

    def drain(self, name: str, timeout_s: float = 600) -> None:
        """Send no more requests to a device and wait for those that run there.

        Raises:
            ConfigError: there is no such device.
            DeadlineError: some still run after the time; nothing new is sent there all the same.
        """
        deadline = time.monotonic() + timeout_s
        while left := self._set_draining(name, True):
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{left} requests still run on {name} after {timeout_s:g} s; wait longer, or "
                    "go on and they will be cut"
                )
            time.sleep(_POLL_S)

    def resume(self, name: str) -> None:
        """Send requests to a device again.

        Raises:
            ConfigError: there is no such device.
        """
        self._set_draining(name, False)

    def close_head(self) -> int:
        """Let the head refuse new requests and drain; returns how many are left."""
        left: int = self._call("close", timeout_s=self.config.drain_timeout_s + 10)
        return left

    def _set_draining(self, name: str, draining: bool) -> int:
        if name not in self.config.devices:
            raise ConfigError(
                f"the fleet has no device {name!r}; it has {', '.join(self.config.devices)}"
            )
        left: int = self._call("set_draining", name, draining)
        return left

    def rollout(
        self,
        reference: str | Reference,
        *,
        canary: int = 1,
        at_once: int = 1,
        gate: Gate = "golden",
        watch_s: float = WATCH_S,
        retry: bool = False,
        allow_older: bool = False,
        plain_http: bool | None = None,
        told: Callable[[FleetRollout], None] = lambda _: None,
    ) -> FleetRollout:
        """Bring every device that is on to one bundle, each by its own roll-out.

        What a reference means is asked once. Call it again as often as you like: devices that have
        the bundle are done at once, and what a driver that was killed has left is gone on with.

        Args:
            reference: HOST[:PORT]/NAME:TAG, or by digest.
            canary: devices that must end well before others are touched, in the file's order.
            at_once: devices that roll out at the same time; another ready one is always left.
            gate: ``golden``, or ``none``; as for ``edge-llm bundle rollout``.
            watch_s: seconds for which each device watches the new bundle, 0 to 86,400.
            retry: also try a bundle that devices have rejected before.
            allow_older: also take a release that has expired or is older than what devices had.
            plain_http: speak HTTP without TLS; None only to a registry on the same machine.
            told: is called with the state of all devices at each change.

        Returns:
            Every device; those in the state ``off`` have to be brought there by another call.

        Raises:
            GateError: a device rejected the bundle; no further one was asked.
            ConfigError: a value is wrong, a device has no ``rollout`` in the fleet's file, or
                another roll-out is at work.
            BundleError: it is no bundle, not signed as this machine or a device wants, or a
                release that has expired or is older than what a device had.
            RegistryError: the registry does not answer.
            DeadlineError: no device is on, one was lost, or none is left to answer meanwhile.
            BackendError: a device failed, or the head does not answer.
        """
        from edge_fleet.registry.client import Registry
        from edge_fleet.registry.pull import look
        from edge_fleet.registry.reference import Reference, parse_reference

        for name, value in (("canary", canary), ("at_once", at_once)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; use 1 or more")
        if gate not in get_args(Gate):
            raise ConfigError(f"gate is {gate!r}; use one of {', '.join(get_args(Gate))}")
        if not 0 <= watch_s <= MAX_WATCH_S:
            raise ConfigError(f"watch_s is {watch_s:g}; use 0 to {MAX_WATCH_S:,}")
        if without := [name for name, each in self.config.devices.items() if not each.rollout]:
            raise ConfigError(
                f"fleet.toml names no rollout for {', '.join(without)}; write one for all, e.g. "
                'rollout = ["edge-llm", "bundle", "rollout", "--link", ...], and run '
                "edge-llm fleet up"
            )
        if not isinstance(reference, Reference):
            reference = parse_reference(reference)
        with Registry(reference, plain_http=plain_http) as registry:
            offer = look(reference, registry)
        place = f"{reference.registry}/{reference.repository}@{offer.digest}"

        from .serving import RayCrew

        return Driver(
            RayCrew(self.config),
            self.config.devices,
            Order(place, gate, watch_s, retry, plain_http, allow_older),
            offer.manifest.self_sha256,
            canary=canary,
            at_once=at_once,
            told=told,
        ).run()

    def computer(
        self,
        devices: Sequence[str] = (),
        *,
        mix: bool = False,
        told: Callable[[str], None] = lambda _: None,
    ) -> FleetComputer:
        """Return what `edge_lab.measure.evaluator` evaluates with: the devices, side by side.

        Args:
            devices: that compute; none is all that have joined.
            mix: let devices of different kinds compute together.
            told: is told in a line which devices compute, and which are not there or are lost.

        Raises:
            ConfigError: there is no such device, or they are of different kinds or versions.
            DeadlineError: none is there.
        """
        from .evaluation import FleetComputer
        from .seats import RaySeat, present

        if unknown := [name for name in devices if name not in self.config.devices]:
            raise ConfigError(
                f"the fleet has no device {unknown[0]!r}; it has {', '.join(self.config.devices)}"
            )
        wanted = dict.fromkeys(devices or self.config.devices)
        joined = present(self.config)
        if absent := [name for name in wanted if name not in joined]:
            told(f"{', '.join(absent)} left out: not there")
        seats: dict[str, Seat] = {name: RaySeat(name) for name in wanted if name in joined}
        return FleetComputer(seats, mix=mix, told=told)

    def _call(self, method: str, *arguments: Any, timeout_s: float = 10) -> Any:
        from . import serving

        return serving.call_head(method, *arguments, timeout_s=timeout_s)
