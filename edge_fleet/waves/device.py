"""Polls for a device: asks what is wanted, acts if its turn has come, and reports."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from edge.errors import (
    BundleError,
    ConfigError,
    DeadlineError,
    EdgeError,
    GateError,
    RegistryError,
    ResourceError,
)
from edge.files import MALFORMED
from edge_fleet.registry.pull import origin_digest
from edge_fleet.registry.reference import Reference, is_loopback, parse_reference
from edge_fleet.registry.release import release_at
from edge_fleet.rollout.journal import Place
from edge_fleet.rollout.steps import roll_back

from .wanted import Envelope, Outcome, Report, Wanted, unseal

_TIMEOUT_S = 60.0
_MAX_BYTES = 1 << 16
_MAX_REASON = 600
_LATER = (RegistryError, ResourceError, DeadlineError)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the key is for the named receiver only."""


@dataclass(frozen=True)
class Receiver:
    """The server that hands out the wanted state and takes reports.

    Args:
        url: address of the receiver, e.g. ``https://fleet.example.com``.
        key: the device's own key.

    Raises:
        ConfigError: the address is invalid, or would show the key to the network.
    """

    url: str
    key: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.netloc))
        if not safe or not parts.hostname:
            raise ConfigError(
                f"{self.url!r} is no address of a receiver; write https://fleet.example.com (http "
                "would show the device's key, so it is for this very machine only)"
            )

    def wanted(self) -> Envelope:
        """Ask for the wanted state.

        Raises:
            RegistryError: the receiver does not answer.
            ConfigError: it does not know the key, or nothing is wanted yet.
            BundleError: its answer is something else.
        """
        data = self._ask("/wanted")
        try:
            return msgspec.json.decode(data, type=Envelope)
        except MALFORMED as error:
            raise BundleError(f"{self.url}/wanted is of another form: {error}") from error

    def report(self, report: Report) -> None:
        """Send a report; raise the errors of `wanted`."""
        self._ask("/reports", msgspec.json.encode(report))

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        context = ssl.create_default_context() if self.url.startswith("https") else None
        handlers = [] if context is None else [urllib.request.HTTPSHandler(context=context)]
        try:
            with urllib.request.build_opener(_NoRedirect(), *handlers).open(
                request, timeout=_TIMEOUT_S
            ) as response:
                found: bytes = response.read(_MAX_BYTES)
                return found
        except urllib.error.HTTPError as error:
            said = error.read(_MAX_BYTES).decode("utf-8", "replace").strip()[:300]
            kind = ConfigError if 400 <= error.code < 500 else RegistryError
            raise kind(f"{self.url}{path} answered {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise RegistryError(
                f"{self.url}{path} gives no answer ({error}); what is here serves on"
            ) from error


@dataclass(frozen=True)
class Poll:
    """One poll of a device for the wanted state.

    Attributes:
        receiver: receiver to ask.
        link, staging, reload, trusted_keys: fields of an `edge_fleet.rollout.steps.Plan`.
        roll_out: brings the device to a reference; raises the errors of `steps.roll_out`.
        now: local time.
    """

    receiver: Receiver
    link: Path
    roll_out: Callable[[Reference], object]
    staging: Path | None = None
    reload: str | None = None
    trusted_keys: Path | None = None
    now: Callable[[], datetime] = datetime.now

    def run(self, told: Callable[[str], None]) -> Report:
        """Ask, act and report; a report that does not arrive is sent again by the next poll.

        Args:
            told: called with notes for people.

        Raises:
            EdgeError: `Receiver.wanted` or `edge_fleet.waves.wanted.unseal` fails; or a roll-out
                failed, once that is reported.
        """
        envelope = self.receiver.wanted()
        wanted = self._unseal(envelope)
        began = time.time()
        failure: EdgeError | None = None
        outcome: Outcome
        try:
            outcome, reason = self._act(wanted, envelope)
        except EdgeError as error:
            failure, reason = error, str(error)[:_MAX_REASON]
            outcome = "failed"
            if isinstance(error, (GateError, BundleError)):
                outcome = "rejected"
            elif isinstance(error, _LATER):
                outcome = "later"
        release = release_at(self.link)
        report = Report(
            wanted.number,
            outcome,
            began,
            time.time(),
            self._running() or "",
            0 if release is None else release.number,
            0 if failure is None else failure.exit_code,
            reason,
        )
        try:
            self.receiver.report(report)
        except EdgeError as error:
            told(f"the report is made again by the next poll: {error}")
        if failure is not None:
            raise failure
        return report

    def _unseal(self, envelope: Envelope) -> Wanted:
        place = Place(self.link, self.staging)
        with place.locked():
            journal = place.read()
            wanted = unseal(envelope, self.receiver.url, self.trusted_keys, journal.wanted)
            if wanted.number > journal.wanted:
                journal.wanted = wanted.number
                place.write(journal)
        return wanted

    def _act(self, wanted: Wanted, envelope: Envelope) -> tuple[Outcome, str]:
        reference = parse_reference(wanted.reference)
        has = self._running() == reference.digest
        if wanted.do == "rollback":
            if has:
                roll_back(self.link, self.reload, self.staging)
            return "back", ""
        if has:
            return "has", ""
        position = wanted.position(envelope.device)
        if position > envelope.begin:
            return "waiting", "its wave has not come"
        if not wanted.is_open_at(self.now()):
            return "waiting", f"it begins within the hours {wanted.window}"
        self.roll_out(reference)
        return "has", ""

    def _running(self) -> str | None:
        return origin_digest(self.link)
