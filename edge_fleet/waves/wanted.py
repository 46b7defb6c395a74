"""Defines the wanted state: the bundle that a fleet shall have, signed and numbered against replay.

It is the text of one JSON document with its minisign signature. The receiver adds, unsigned, which
devices may begin now. So whoever controls the receiver may delay a roll-out or hurry it, but cannot
change what is rolled out.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from edge.bundle.minisign import check_signature, parse_signature, read_public_keys
from edge.bundle.trust import trusted_keys_file
from edge.errors import BundleError, ConfigError, IntegrityError
from edge.files import MALFORMED
from edge_fleet.registry.reference import parse_reference
from edge_make.signing import Signer

WAVES = ("1", "5%", "25%", "100%")
NOBODY = ""
_WAVE = re.compile(r"[1-9]\d{0,6}|(?:[1-9]\d?|100)%")
_WINDOW = re.compile(r"([01]?\d|2[0-3])-([01]?\d|2[0-3])")
Outcome = Literal["has", "rejected", "failed", "later", "waiting", "back"]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bundle that a fleet shall have, and how to get there.

    Attributes:
        number: one higher for each new state; a device takes none lower than one it has seen.
        reference: reference of the bundle, by digest.
        do: ``rollout`` brings devices to it; ``rollback`` has those that have it go back to the
            bundle that they had before, at once and without judging.
        waves: how many devices may have begun in each wave: a count, or a share of all.
        max_failed: number of devices that may fail before no other one begins.
        window: hours of a device's local time in which it begins, as ``22-6``; empty for any.
    """

    number: int
    reference: str
    do: Literal["rollout", "rollback"] = "rollout"
    waves: tuple[str, ...] = WAVES
    max_failed: int = 0
    window: str = ""

    def check(self) -> None:
        """Refuse a state that no device could obey.

        Raises:
            ConfigError: a field is wrong.
        """
        if self.number < 1 or self.max_failed < 0:
            raise ConfigError("number is at least 1 and max_failed at least 0")
        if parse_reference(self.reference).digest is None:
            raise ConfigError(f"{self.reference} has no digest; a fleet rolls out one content")
        if not self.waves or not all(map(_WAVE.fullmatch, self.waves)):
            raise ConfigError(
                f"waves are {','.join(self.waves)!r}; write counts and shares: 1,5%,25%,100%"
            )
        if self.window and _WINDOW.fullmatch(self.window) is None:
            raise ConfigError(f"the window is {self.window!r}; write two local hours, as 22-6")

    def is_open_at(self, now: datetime) -> bool:
        """Whether a local time is within the window, which may span midnight."""
        found = _WINDOW.fullmatch(self.window)
        if found is None:
            return True
        begin, end = int(found[1]), int(found[2])
        inside = begin <= now.hour < end if begin < end else not end <= now.hour < begin
        return begin == end or inside

    def position(self, device: str) -> str:
        """Return a device's place in the order of this roll-out: 16 hexadecimal digits."""
        digest = parse_reference(self.reference).digest
        return hashlib.sha256(f"{self.number} {digest} {device}".encode()).hexdigest()[:16]


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The wanted state as a device gets it.

    Attributes:
        wanted: text of a `Wanted`, whose bytes are signed.
        signature: minisign's signature of it.
        device: name of the device, as the receiver knows it.
        begin: the last position that may begin now; empty for none.
    """

    wanted: str
    signature: str
    device: str = ""
    begin: str = NOBODY


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device's report about a wanted state.

    Attributes:
        number: number of the state.
        outcome: ``has`` the bundle; ``rejected`` it, and serves its old one; ``failed`` at a step;
            tries ``later``, since the registry or memory was unavailable; is ``waiting`` for its
            wave or hours; went ``back``.
        began_s, ended_s: seconds since 1970 by the device's clock.
        running: digest of the bundle that its link leads to; empty without one.
        release: number of that release; 0 without a number.
        code: exit code that a roll-out by hand would have had.
        reason: why it does not have the bundle.
    """

    number: int
    outcome: Outcome
    began_s: float
    ended_s: float
    running: str = ""
    release: int = 0
    code: int = 0
    reason: str = ""


def seal(wanted: Wanted, key: Signer) -> Envelope:
    """Sign a wanted state.

    Raises:
        ConfigError: no device could obey the state (`Wanted.check`).
        DependencyError: minisign is not installed.
    """
    wanted.check()
    text = msgspec.json.encode(wanted)
    signature = key.sign(text, f"edge-llm wanted state {wanted.number}")
    return Envelope(text.decode(), signature.decode())


def unseal(envelope: Envelope, where: str, trusted_keys: Path | None, seen: int = 0) -> Wanted:
    """Read a wanted state that a trusted key has signed.

    Args:
        envelope: what was handed out.
        where: its source, for messages.
        trusted_keys: file of trusted keys (`edge.bundle.trust.trusted_keys_file`); without keys the
            signature is not checked.
        seen: the highest number that was here.

    Raises:
        IntegrityError: the signature is wrong, or its key is bound to other names.
        BundleError: it is no wanted state, or an older one.
        ConfigError: no device could obey the state (`Wanted.check`).
    """
    data = envelope.wanted.encode()
    file = trusted_keys_file(trusted_keys)
    key = None
    if file is not None:
        signature = parse_signature(envelope.signature.encode(), where)
        try:
            key = check_signature(data, signature, read_public_keys(file))
        except IntegrityError as error:
            raise IntegrityError(
                f"the wanted state of {where} is refused: {error} ({file})"
            ) from error
    try:
        wanted = msgspec.json.decode(data, type=Wanted)
    except MALFORMED as error:
        raise BundleError(f"{where} has no wanted state of this edge-llm: {error}") from error
    wanted.check()
    name = parse_reference(wanted.reference).repository
    if key is not None and not key.covers(name):
        raise IntegrityError(
            f"the key {key.name} is not trusted for {name} ({file}); see its names"
        )
    if wanted.number < seen:
        raise BundleError(
            f"{where} hands out the wanted state {wanted.number}, and {seen} was here: somebody "
            "replays an old one; what is here stays"
        )
    return wanted
