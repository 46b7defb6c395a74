"""Puts the head and the devices on Ray Serve: one replica per device, held there by a resource."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

import edge
from edge.server.http.guard import App

from .config import FleetConfig
from .device import DeviceAgent
from .head import FleetHead
from .members import Asked, Item, LostError
from .names import HEAD_APP, HEAD_RESOURCE, device_app, device_resource

_SHARE = 0.001  # of a resource, so that a replica's successor fits beside it
_MANY = 100_000  # requests at once: the head and the devices' own queues bound them
_BROKEN = (RayError, RayServeException)


class RayLink:
    """The way to one device through Ray.

    Args:
        handle: of the device's application.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._look = handle.options(method_name="look")
        self._ask = handle.options(method_name="ask", stream=True)

    async def look(self) -> Mapping[str, Any]:
        """See `fleet.members.Link`."""
        answer = self._look.remote()
        try:
            seen: Mapping[str, Any] = await answer
        except _BROKEN as error:
            raise LostError(_reason(error)) from error
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return seen

    async def ask(self, asked: Asked) -> AsyncGenerator[Item, None]:
        """See `fleet.members.Link`."""
        answer = self._ask.remote(tuple(asked))
        try:
            async for item in answer:
                yield item
        except _BROKEN as error:
            raise LostError(_reason(error)) from error
        finally:
            answer.cancel()  # of one that has ended, nothing


class HeadReplica:
    """The head as Ray Serve runs it.

    Args:
        config: `FleetConfig` as plain data.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        read = msgspec.convert(config, FleetConfig)
        links = {name: RayLink(serve.get_app_handle(device_app(name))) for name in read.devices}
        self._config = read
        self._head = FleetHead(read, links)
        self._watching = asyncio.get_running_loop().create_task(self._head.watch())

    def __serve_build_asgi_app__(self) -> App:
        """Return the application; Serve calls this."""
        return self._head.app

    async def status(self) -> dict[str, Any]:
        """Return the state of the fleet."""
        return self._head.status()

    async def set_draining(self, name: str, draining: bool) -> int:
        """Take a device out or back in; returns how many requests still run there."""
        member = self._head.members[name]
        member.draining = draining
        return member.in_flight

    async def close(self) -> int:
        """Refuse new requests and wait for those that run; returns how many are left."""
        self._head.is_draining = True
        deadline = asyncio.get_running_loop().time() + self._config.drain_timeout_s
        while (left := self._head.status()["in_flight"]) and (
            asyncio.get_running_loop().time() < deadline
        ):
            await asyncio.sleep(0.05)
        return int(left)


def deploy(config: FleetConfig) -> None:
    """Start or renew the head and a replica for each device; those of absent devices wait.

    Ray must be connected, from the head's machine.
    """
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": config.port, "keep_alive_timeout_s": 15},
    )
    targets = []
    for name, device in config.devices.items():
        agent = serve.deployment(DeviceAgent).options(
            name="device",
            version=_version(msgspec.json.encode(device)),
            num_replicas=1,
            max_ongoing_requests=_MANY,
            ray_actor_options={"num_cpus": 0, "resources": {device_resource(name): _SHARE}},
        )
        bound = agent.bind(device.url, device.key_file)
        targets.append(serve.RunTarget(bound, device_app(name), None))
    keys = b"" if config.api_key_file is None else Path(config.api_key_file).read_bytes()
    head = serve.deployment(serve.ingress()(HeadReplica)).options(
        name="head",
        version=_version(msgspec.json.encode(config) + keys),
        num_replicas=1,
        max_ongoing_requests=_MANY,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_RESOURCE: _SHARE}},
    )
    targets.append(serve.RunTarget(head.bind(msgspec.to_builtins(config)), HEAD_APP, "/"))
    serve.run_many(targets, wait_for_applications_running=False)
    gone = set(serve.status().applications) - {target.name for target in targets}
    for name in gone:
        serve.delete(name)


def call_head(method: str, *arguments: Any, timeout_s: float = 10) -> Any:
    """Call a method of `HeadReplica` from the head's machine.

    Raises:
        RayServeException, RayError, TimeoutError: it does not run, or does not answer in time.
    """
    handle = serve.get_app_handle(HEAD_APP).options(method_name=method)
    return handle.remote(*arguments).result(timeout_s=timeout_s)


def stop() -> None:
    """End every application and Ray Serve itself."""
    serve.shutdown()


def _version(what: bytes) -> str:
    return hashlib.sha256(edge.__version__.encode() + what).hexdigest()[:16]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
