"""Puts the head and the devices into Ray: one actor for each device, held there by a resource.

Plain actors, not Ray Serve: the head holds the ring itself and has the server's own HTTP in front,
so that Serve's proxy, controller and routers would be three more processes and one more hop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError

import edge
from edge.errors import BackendError, ConfigError
from edge_lab.key_file import read_key_file
from edge_serve.http.connections import (
    Connections,
    listen,
    possible_connections,
    raise_file_limit,
)
from edge_serve.http.messages import make_server
from edge_serve.settings import ServerSettings

from .config import Device, FleetConfig
from .device import DeviceAgent
from .errand import Order, Report
from .head import FleetHead
from .members import Asked, Item, LostError
from .names import HEAD_RESOURCE, device_resource
from .rollout import LEASE_S

NAMESPACE = "edge-llm-fleet"
_SHARE = 0.001  # of a resource, so that an actor's successor fits beside it
_END_S = 10.0
_ASK_S = 10.0
_MANY = 10_000  # calls at once: the head and the devices' own queues bound them


class RayLink:
    """The way to one device through Ray.

    Args:
        agent: handle of the device's `DeviceAgent`.
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    async def look(self) -> Mapping[str, Any]:
        """See `edge_fleet.devices.members.Link`."""
        answer = self._agent.look.remote()
        try:
            seen: Mapping[str, Any] = await answer
        except RayError as error:
            raise LostError(_reason(error)) from error
        except asyncio.CancelledError:
            ray.cancel(answer)  # else it waits for an absent device for ever
            raise
        return seen

    async def ask(self, asked: Asked) -> AsyncGenerator[Item, None]:
        """See `edge_fleet.devices.members.Link`."""
        answer = self._agent.ask.options(num_returns="streaming").remote(tuple(asked))
        ended = False
        try:
            async for item in answer:
                yield await item
            ended = True
        except RayError as error:
            ended = True
            raise LostError(_reason(error)) from error
        finally:
            if not ended:
                ray.cancel(answer)


class HeadActor:
    """The head as an actor; it serves from the moment that Ray has made it, or made it again.

    Args:
        config: `FleetConfig` as plain data.
        drained_file: see `FleetHead`.

    Raises:
        ConfigError: the file of API keys cannot be used, or the address not be had.
    """

    def __init__(self, config: dict[str, Any], drained_file: Path) -> None:
        raise_file_limit()
        self._config = msgspec.convert(config, FleetConfig)
        agents = {
            name: ray.get_actor(_agent_name(name, device), NAMESPACE)
            for name, device in self._config.devices.items()
        }
        limit = possible_connections(ServerSettings().max_connections, 0)
        self._head = FleetHead(
            self._config,
            {name: RayLink(agent) for name, agent in agents.items()},
            limit,
            drained_file,
        )
        settings = self._head.settings
        connections = Connections(settings.max_connections, settings.max_connections_per_address)
        socket = listen(settings.host, settings.port)
        socket.on_lack = connections.close_idlest
        server = make_server(self._head.app, settings, connections)
        self._driver, self._held_until = "", 0.0
        loop = asyncio.get_running_loop()  # Ray makes an actor with coroutines in its loop
        self._tasks = [
            loop.create_task(self._head.watch()),
            loop.create_task(server.serve(sockets=[socket])),
        ]

    async def status(self) -> dict[str, Any]:
        """Return the state of the fleet."""
        return self._head.status()

    async def set_draining(self, name: str, draining: bool) -> int:
        """Take a device out or back in; returns how many requests still run there."""
        return self._head.set_draining(name, draining)

    async def hold(self, driver: str, hashes: Sequence[str]) -> bool:
        """Accept these bundles beside those that most devices have, for one roll-out at a time.

        Returns:
            Whether this driver may go on: none other has said anything for `LEASE_S`.
        """
        now = asyncio.get_running_loop().time()
        if driver != self._driver and now < self._held_until:
            return False
        self._driver, self._held_until = driver, now + LEASE_S
        self._head.accepted = frozenset(hashes)
        return True

    async def release(self, driver: str, hashes: Sequence[str]) -> None:
        """End the roll-out of this driver; these bundles are accepted from now on."""
        if driver == self._driver:
            self._held_until = 0.0
            self._head.accepted = frozenset(hashes)

    async def close(self) -> int:
        """Refuse new requests and wait for those that run; returns how many are left."""
        self._head.is_draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_timeout_s
        while (left := self._head.in_flight) and loop.time() < deadline:
            await asyncio.sleep(0.05)
        return left


class RayCrew:
    """Head and devices for `edge_fleet.devices.rollout.Driver`; Ray must be connected.

    Args:
        config: the fleet's file, the same with which it was brought up.
    """

    def __init__(self, config: FleetConfig) -> None:
        self._devices = config.devices

    def status(self) -> Mapping[str, Any]:
        """See `edge_fleet.devices.rollout.Crew`."""
        found: Mapping[str, Any] = call_head("status")
        return found

    def hold(self, driver: str, hashes: Sequence[str]) -> bool:
        """See `edge_fleet.devices.rollout.Crew`."""
        return bool(call_head("hold", driver, list(hashes)))

    def release(self, driver: str, hashes: Sequence[str]) -> None:
        """See `edge_fleet.devices.rollout.Crew`."""
        call_head("release", driver, list(hashes))

    def roll_out(self, name: str, driver: str, order: Order) -> Report:
        """See `edge_fleet.devices.rollout.Crew`.

        Raises:
            ConfigError: the device refuses.
            LostError: it does not answer.
        """
        said = self._ask(name, "roll_out", driver, msgspec.to_builtins(order))
        if "refused" in said:
            raise ConfigError(said["refused"])
        return msgspec.convert(said["report"], Report)

    def look(self, name: str) -> Report | None:
        """See `edge_fleet.devices.rollout.Crew`."""
        return msgspec.convert(self._ask(name, "look_at_rollout"), Report | None)

    def _ask(self, name: str, method: str, *arguments: Any) -> Any:
        try:
            agent = ray.get_actor(_agent_name(name, self._devices[name]), NAMESPACE)
        except ValueError as error:
            raise ConfigError(
                f"the fleet was brought up with another fleet.toml, which has not this {name}; run "
                "edge-llm fleet up"
            ) from error
        answer = getattr(agent, method).remote(*arguments)
        try:
            return ray.get(answer, timeout=_ASK_S)
        except RayError as error:
            with contextlib.suppress(RayError):
                ray.cancel(answer)  # or an absent device would begin when it is back
            raise LostError(_reason(error)) from error


def deploy(config: FleetConfig, drained_file: Path) -> None:
    """Start the head and an actor for each device, or renew those whose settings have changed.

    Actors of absent devices wait for them. Ray must be connected, from the head's machine.

    Args:
        config: the fleet's file.
        drained_file: see `FleetHead`.

    Raises:
        ConfigError: the head cannot use its keys, or not have its address.
        BackendError: the head did not start.
    """
    if config.api_key_file is not None:
        read_key_file(Path(config.api_key_file))  # here its error is one line
    agents = {_agent_name(name, device): name for name, device in config.devices.items()}
    head_name = _head_name(config)
    old = _names()
    for name in sorted(old - {*agents, head_name}, reverse=True):  # the head first
        actor = ray.get_actor(name, NAMESPACE)
        if name.startswith(_HEAD):
            ray.get(actor.close.remote())
        ray.kill(actor)
        if name.startswith(_HEAD):
            _wait_free(config)
    for name, device_name in agents.items():
        device = config.devices[device_name]
        ray.remote(DeviceAgent).options(
            **_lasting(name), resources={device_resource(device_name): _SHARE}
        ).remote(device.url, device.key_file, device.rollout)
    if head_name in old:
        return
    listen(config.host, config.port).close()
    head = (
        ray.remote(HeadActor)
        .options(**_lasting(head_name), resources={HEAD_RESOURCE: _SHARE})
        .remote(msgspec.to_builtins(config), drained_file)
    )
    try:
        ray.get(head.status.remote())
    except RayError as error:
        ray.kill(head)
        raise BackendError(f"the head did not start: {error}") from error


def _wait_free(config: FleetConfig) -> None:
    """Wait until the head that was ended has given up its port, or for as long as is sensible."""
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        try:
            listen(config.host, config.port).close()
        except ConfigError:
            time.sleep(0.1)
        else:
            return


def call_head(method: str, *arguments: Any, timeout_s: float = 10) -> Any:
    """Call a method of `HeadActor`.

    Raises:
        BackendError: none runs, or it does not answer in time.
    """
    try:
        name = next((name for name in _names() if name.startswith(_HEAD)), _HEAD)
        head = ray.get_actor(name, NAMESPACE)
        return ray.get(getattr(head, method).remote(*arguments), timeout=timeout_s)
    except (RayError, ValueError) as error:
        raise BackendError(
            f"the head does not answer ({type(error).__name__}); run: edge-llm fleet up"
        ) from error


def _names() -> set[str]:
    """Return the names of the fleet's actors."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in named if each["namespace"] == NAMESPACE}


_HEAD = "head-"


def _lasting(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": _MANY,
        "num_cpus": 0,
    }


def _agent_name(name: str, device: Device) -> str:
    return f"device-{name}-{_digest(msgspec.json.encode(device))}"


def _head_name(config: FleetConfig) -> str:
    """Name the head after all that it is made of, so that a change makes another one."""
    keys = b"" if config.api_key_file is None else Path(config.api_key_file).read_bytes()
    return _HEAD + _digest(edge.__version__.encode() + msgspec.json.encode(config) + keys)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
