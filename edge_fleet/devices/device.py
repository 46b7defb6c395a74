"""Hands the head's requests to the device's own ``edge-llm serve``, and says how that is.

This runs in a worker of Ray on the device. The engine does not: it stays in the device's service,
with that one's sandbox, and works on when Ray or the head is gone.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
from yarl import URL

import edge
from edge.errors import BackendError, ConfigError
from edge.files import MALFORMED
from edge_lab.key_file import read_key_file
from edge_lab.telemetry import read_module

from .errand import Errand, Order, plain

if TYPE_CHECKING:
    from .members import Asked, Item

_POLL_S = 0.25
_LOOK_S = 5.0
"""A service that takes longer is not ready: its engine may leave it little of the CPU."""
_FACTS_S = 2.0
"""How old facts may be; a roll-out changes them."""
_IDLE_S = 5.0  # the service closes idle connections after 15, and a request must not meet that
_READ_BYTES = 2**16


class _Status(msgspec.Struct):
    loaded: bool = False
    num_slots: int = 0
    queue_capacity: int = 0
    backend: str = ""


class _Stats(msgspec.Struct):
    version: str
    models: dict[str, _Status]


class _Card(msgspec.Struct):
    id: str
    max_model_len: int


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Tag(msgspec.Struct):
    name: str
    digest: str


class _Tags(msgspec.Struct):
    models: list[_Tag]


class _Code(msgspec.Struct, frozen=True):
    code: str = ""


class _Error(msgspec.Struct):
    error: _Code = _Code()


class DeviceAgent:
    """The fleet's part on one device; it must be used in one event loop.

    Args:
        url: of the device's service, on loopback.
        key_file: file with a key for it, where it wants one.
        rollout: see `edge_fleet.devices.config.Device`.

    Raises:
        ConfigError: the file of the key cannot be used.
    """

    def __init__(
        self, url: str, key_file: str | None = None, rollout: Sequence[str] | None = None
    ) -> None:
        self._url = url
        self._errand = Errand(rollout)
        self._key_file = None if key_file is None else Path(key_file)
        self._key = None if self._key_file is None else _read_key(self._key_file)
        self._session: aiohttp.ClientSession | None = None
        self._facts: dict[str, Any] = {
            "version": edge.__version__,
            "service": "",
            "kind": read_module() or platform.machine(),
            "models": {},
            "trouble": "loading",
        }
        self._polling: asyncio.Future[None] | None = None
        self._read_at = -float("inf")

    async def look(self) -> dict[str, Any]:
        """Return what `edge_fleet.devices.members.Facts` holds, as it was a moment ago.

        The service is looked at in the background, so that a slow one does not make the device
        look silent.
        """
        if self._polling is None:
            self._polling = asyncio.ensure_future(self._poll())
        return self._facts

    async def _poll(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_POLL_S)

    async def _look(self) -> None:
        try:
            trouble = await self._trouble()
            now = time.monotonic()
            if trouble is None and now - self._read_at > _FACTS_S:
                self._facts |= await self._read_facts()
                self._read_at = now
        except asyncio.TimeoutError:
            trouble = f"its service did not answer within {_LOOK_S:g} s"
        except (aiohttp.ClientError, OSError) as error:
            trouble = f"its service does not answer: {error}"
        except (BackendError, ConfigError, *MALFORMED) as error:
            trouble = f"its service is none of edge-llm serve, or wants a key: {error}"
        self._facts = self._facts | {"trouble": trouble}

    async def ask(self, asked: Asked) -> AsyncGenerator[Item, None]:
        """Yield status and headers, then the body as it comes; None where the service broke off."""
        # Ray's arguments come as a plain tuple from a head of another version.
        method, target, headers, body = asked
        if self._key is not None and not {name for name, _ in headers} & {
            "authorization",
            "x-api-key",
        }:
            headers = [*headers, ("authorization", f"Bearer {self._key}")]
        # As it is, and as a path, whatever comes: "@HOST" in it must not become the host.
        url = URL(f"{self._url}/{target.removeprefix('/')}", encoded=True)
        try:
            async with self._client().request(
                method, url, headers=headers, data=body or None
            ) as answer:
                yield (
                    answer.status,
                    [(name.lower(), value) for name, value in answer.raw_headers],
                )
                async for data in answer.content.iter_any():
                    yield data
        except (aiohttp.ClientError, OSError):
            yield None

    async def roll_out(self, driver: str, order: dict[str, Any]) -> dict[str, Any]:
        """Call `Errand.ask`; returns ``report``, or why it was ``refused``, as plain data."""
        try:
            return {"report": plain(self._errand.ask(driver, msgspec.convert(order, Order)))}
        except (ConfigError, msgspec.ValidationError) as error:
            return {"refused": str(error)}

    async def look_at_rollout(self) -> dict[str, Any] | None:
        """Call `Errand.look`; returns plain data."""
        return plain(self._errand.look())

    async def close(self) -> None:
        """Look no more, and close the connections."""
        if self._polling is not None:
            self._polling.cancel()
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_LOOK_S),
                auto_decompress=False,
                read_bufsize=_READ_BYTES,
                skip_auto_headers=("accept-encoding", "user-agent"),
            )
        return self._session

    async def _trouble(self) -> str | None:
        status, body = await self._get("/ready")
        if status == 200:
            return None
        return msgspec.json.decode(body, type=_Error).error.code or f"it answers {status}"

    async def _read_facts(self) -> dict[str, Any]:
        bodies = []
        for path in ("/stats", "/v1/models", "/api/tags"):
            status, body = await self._get(path)
            if status == 401 and self._key_file is not None:
                self._key = _read_key(self._key_file)  # it may be another now; the next look says
            if status != 200:
                raise BackendError(f"{path} answers {status}")
            bodies.append(body)
        stats = msgspec.json.decode(bodies[0], type=_Stats)
        contexts = {
            card.id: card.max_model_len for card in msgspec.json.decode(bodies[1], type=_Cards).data
        }
        # A name without a tag is listed with one.
        hashes = {tag.name: tag.digest for tag in msgspec.json.decode(bodies[2], type=_Tags).models}
        models = {
            name: {
                "sha256": hashes.get(name) or hashes.get(f"{name}:latest", ""),
                "slots": status.num_slots,
                "queue": status.queue_capacity,
                "context": contexts.get(name, 0),
                "backend": status.backend,
            }
            for name, status in stats.models.items()
            if status.loaded
        }
        return {"service": stats.version, "models": models}

    async def _get(self, path: str) -> tuple[int, bytes]:
        headers = {} if self._key is None else {"authorization": f"Bearer {self._key}"}
        timeout = aiohttp.ClientTimeout(total=_LOOK_S)
        async with self._client().get(self._url + path, headers=headers, timeout=timeout) as answer:
            return answer.status, await answer.read()


def _read_key(path: Path) -> str:
    entry, *more = read_key_file(path)
    if more or entry.key is None:
        raise ConfigError(f"{path} must hold one API key of the device's service, not its hash")
    return entry.key
