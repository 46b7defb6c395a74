"""`Fleet`: what an operator may do with a fleet, from the head's machine or a device's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edge.errors import BackendError, ConfigError, DeadlineError

from . import cluster
from .config import FleetConfig, read_config

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

        serving.deploy(self.config)

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

    def _call(self, method: str, *arguments: Any, timeout_s: float = 10) -> Any:
        from ray.exceptions import RayError

        from . import serving

        try:
            return serving.call_head(method, *arguments, timeout_s=timeout_s)
        except (RayError, ValueError) as error:
            raise BackendError(
                f"the head does not answer ({type(error).__name__}); run: edge-llm fleet up"
            ) from error
