"""Decides who may call, and how often: API keys and rate limits."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from edge.errors import ConfigError

_MIN_KEY_CHARS = 8


@dataclass(frozen=True)
class Client:
    """The caller of a request.

    Attributes:
        name: the name of its key; ``anonymous`` without keys.
        salt: keeps cached prefixes of different keys apart; empty without keys.
    """

    name: str = "anonymous"
    salt: str = ""


class APIKeys:
    """API keys, compared in constant time.

    Args:
        keys: pairs of a name and a key.
    """

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        self._clients = [
            (_digest(key.encode()), Client(name, _digest(key.encode()).hex()[:16]))
            for name, key in keys
        ]

    @classmethod
    def from_file(cls, path: Path) -> APIKeys:
        """Read one key per line, ``NAME:KEY`` or just the key; ``#`` begins a comment line.

        Raises:
            ConfigError: the file cannot be read or has no key, or a key is short or repeated.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API keys of {path} ({error})") from error
        keys: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, _, key = text.rpartition(":")
            if len(key) < _MIN_KEY_CHARS or not key.isascii() or key in keys.values():
                raise ConfigError(
                    f"line {number} of {path} has no new key of at least {_MIN_KEY_CHARS} ASCII "
                    "characters; write NAME:KEY"
                )
            keys[name or f"key-{number}"] = key
        if not keys:
            raise ConfigError(f"{path} has no API key; write one per line, as NAME:KEY")
        return cls(keys.items())

    def find(self, authorization: bytes | None) -> Client | None:
        """Return the client of an ``Authorization: Bearer`` header, or None.

        Every key is compared, so that the time tells nothing about any of them.
        """
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = _digest(given.strip())
        found = None
        for key, client in self._clients:
            if hmac.compare_digest(key, digest):
                found = client
        return found if scheme.lower() == b"bearer" else None


def address_group(address: str) -> str:
    """Return what limits count as one client's address: of IPv6 the network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.IPv6Network((parsed, 64), strict=False))
    return address


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RateLimit:
    """A bucket of tokens for each client: bursts up to a minute's worth, then a steady rate.

    Args:
        per_minute: requests that a client may send in a minute; 0 sets no limit.
        clock: returns monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # By client (there are few): tokens, and when they were counted.
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> float:
        """Take a token of this client; returns 0, or the seconds until there is one."""
        if not self._per_minute:
            return 0.0
        now = self._clock()
        level, since = self._levels.get(client, (float(self._per_minute), now))
        level = min(self._per_minute, level + (now - since) * self._per_minute / 60)
        if level < 1:
            self._levels[client] = (level, now)
            return (1 - level) * 60 / self._per_minute
        self._levels[client] = (level - 1, now)
        return 0.0
