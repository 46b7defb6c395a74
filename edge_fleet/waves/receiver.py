"""Hands out the wanted state, and takes reports, from each device only about itself."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge.bundle.update import replace_durably
from edge.errors import ConfigError
from edge.files import MALFORMED, read_file
from edge_make.key_file import read_key_file

from .progress import Progress, Reports
from .wanted import Envelope, Report, Wanted

_MAX_BYTES = 1 << 16


class State:
    """A directory with the wanted state, the devices' keys, and their reports.

    Args:
        folder: the directory; it is made if it is missing.
        keys: file of the devices' keys, NAME:KEY or NAME:sha256:HEX each.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, folder: Path, keys: Path | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {folder}: {error.strerror}") from error
        self._path = folder / "wanted.json"
        self._keys = keys or folder / "device-keys"
        self.reports = Reports(folder / "reports.sqlite")

    def names(self) -> dict[bytes, str]:
        """Map the hash of each device's key to its name; the file is read each time."""
        return {entry.digest: entry.name for entry in read_key_file(self._keys)}

    def envelope(self) -> Envelope | None:
        """Read the envelope to hand out; None before anything is wanted.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return msgspec.json.decode(read_file(self._path, _MAX_BYTES), type=Envelope)
        except FileNotFoundError:
            return None
        except (OSError, *MALFORMED) as error:
            raise ConfigError(f"{self._path} is no wanted state: {error}") from error

    def wanted(self) -> Wanted | None:
        """Read the wanted state, as it was signed here."""
        found = self.envelope()
        return None if found is None else msgspec.json.decode(found.wanted, type=Wanted)

    def publish(self, envelope: Envelope) -> None:
        """Hand out this envelope from now on.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            replace_durably(
                self._path, lambda file: file.write(msgspec.json.encode(envelope)), mode=0o644
            )
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error

    def progress(self) -> Progress:
        """Return how far the devices are.

        Raises:
            ConfigError: nothing is wanted yet.
        """
        wanted = self.wanted()
        if wanted is None:
            raise ConfigError(
                "nothing is wanted of the fleet yet; begin with edge-llm fleet rollout"
            )
        return self.reports.progress(wanted, self.names().values())

    # ------------------------------------------------------------------------------- requests

    def hand_out(self, device: str) -> Envelope | None:
        """Make the envelope for a device; None before anything is wanted."""
        self.reports.saw(device)
        envelope = self.envelope()
        if envelope is None:
            return None
        return msgspec.structs.replace(envelope, device=device, begin=self.progress().begin)

    def who(self, authorization: str) -> str | None:
        """Find the device with this key; None if there is none."""
        digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest()
        for known, name in self.names().items():
            if hmac.compare_digest(known, digest):
                return name
        return None


def make_app(state: State) -> Starlette:
    """Make the application: ``GET /wanted``, ``POST /reports``."""

    async def wanted(request: Request) -> Response:
        device = await run_in_threadpool(state.who, request.headers.get("authorization", ""))
        if device is None:
            return Response("the key is no device's; see edge-llm fleet receive\n", 401)
        found = await run_in_threadpool(state.hand_out, device)
        if found is None:
            return Response("nothing is wanted yet\n", 404)
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def reports(request: Request) -> Response:
        device = await run_in_threadpool(state.who, request.headers.get("authorization", ""))
        if device is None:
            return Response("the key is no device's; see edge-llm fleet receive\n", 401)
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > _MAX_BYTES:
                return Response("a report is smaller\n", 413)
        try:
            report = msgspec.json.decode(data, type=Report)
        except MALFORMED as error:
            return Response(f"it is no report: {error}\n", 422)
        await run_in_threadpool(state.reports.add, device, report)
        return Response(status_code=204)

    return Starlette(
        routes=[Route("/wanted", wanted), Route("/reports", reports, methods=["POST"])]
    )
