"""Decides who calls, whether they may, and how often: API keys, addresses and rate limits."""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_make.key_file import key_digest, read_key_file
from edge_serve.settings import Network, is_loopback

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{1,45}\]|[A-Za-z0-9.-]{1,255})(:[0-9]{0,5})?")
_MOST_CLIENTS = 4096  # that a rate limit remembers
_PROXIED = (b"forwarded", b"x-forwarded-for", b"via")  # headers that proxies add
_SAID = re.compile(rb"[ -~]{1,100}")


@dataclass(frozen=True)
class Client:
    """The caller of a request.

    Attributes:
        name: the name of its key; ``anonymous`` without keys.
        salt: keeps cached prefixes of different keys apart; empty without keys.
        origin: identity for fair sharing: the client that a trusted proxy names, else the name of
            the key, else the address.
    """

    name: str = "anonymous"
    salt: str = ""
    origin: str = ""


class APIKeys:
    """The API keys of a file, compared in constant time.

    Args:
        path: the file, in the format of `edge_make.key_file`.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clients = _read(path)

    def reread(self) -> None:
        """Read the file again; from then on only the keys in it are valid.

        Raises:
            ConfigError: the file cannot be used; the keys stay as they were.
        """
        self._clients = _read(self._path)

    @property
    def names(self) -> list[str]:
        """Names of the keys, each once."""
        return list(dict.fromkeys(client.name for _, client in self._clients))

    def find(self, authorization: bytes | None, x_api_key: bytes | None = None) -> Client | None:
        """Return the client of an ``Authorization: Bearer`` or ``X-API-Key`` header, or None.

        The second header counts only without the first. Every key is compared, so that the time
        reveals nothing about any of them.
        """
        if authorization is None and x_api_key is not None:
            authorization = b"Bearer " + x_api_key
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = key_digest(given.strip())
        found = None
        for key, client in self._clients:
            if hmac.compare_digest(key, digest):
                found = client
        return found if scheme.lower() == b"bearer" else None


def _read(path: Path) -> list[tuple[bytes, Client]]:
    return [
        (entry.digest, Client(entry.name, entry.digest.hex()[:16], entry.name))
        for entry in read_key_file(path)
    ]


def address_group(address: str) -> str:
    """Return the address that limits apply to: for IPv6 the network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.IPv6Network((parsed, 64), strict=False))
    return address


def is_in(address: str, networks: Sequence[Network]) -> bool:
    """Whether an address is in one of the networks; an invalid address is in none."""
    try:
        plain = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    plain = getattr(plain, "ipv4_mapped", None) or plain
    return any(plain in network for network in networks)


class Origins:
    """Tells clients apart by address, or behind a trusted proxy by the proxy's header.

    Args:
        trusted: addresses whose header ``x-edge-client`` counts.
        on_ignored: called when any other address sends it.
    """

    def __init__(self, trusted: Sequence[Network], on_ignored: Callable[[], None]) -> None:
        self._trusted = trusted
        self._on_ignored = on_ignored

    def find(self, address: str, said: bytes | None) -> str:
        """Return the identity of the client.

        Args:
            address: the address that the connection comes from; empty if it has none.
            said: value of the header; one that is empty, too long or not printable counts as
                absent.
        """
        group = address_group(address)
        if said is None:
            return group
        if not is_in(address, self._trusted):
            self._on_ignored()
        elif _SAID.fullmatch(said):
            return address_group(said.decode())
        return group


def is_admin(
    client: Client,
    address: str | None,
    admin_keys: Collection[str] | None,
    header: Callable[[bytes], bytes | None],
) -> bool:
    """Whether a client may load and unload models by hand.

    Args:
        client: the client that asks.
        address: where the connection comes from; None is this process.
        admin_keys: names of the keys that may; None if there are no keys, and then this machine
            may.
        header: returns a header of the request by its name in lower case.
    """
    if admin_keys is not None:
        return client.name in admin_keys
    if address is None:
        return True
    # Behind a trusted proxy on this machine, the client is the one that the proxy names. Other
    # proxies show in headers, and a page that rebinds its DNS name to this machine shows in Host.
    return (
        is_loopback(address)
        and client.origin == address_group(address)
        and all(header(name) is None for name in _PROXIED)
        and is_local(header(b"host") or b"")
    )


def is_local(host: bytes) -> bool:
    """Whether a header ``Host`` names exactly this machine."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].decode().lower())


def is_cross_site(method: str, header: Callable[[bytes], bytes | None]) -> bool:
    """Whether a page of another site sends a request that may change or compute something.

    The header ``Sec-Fetch-Site`` tells, and stays true behind a proxy with another name. If a
    browser sends none (an old one; plain HTTP to another machine), ``Origin`` and ``Host`` tell, as
    in Go's http.CrossOriginProtection. Programs send neither. An origin of another scheme is an app
    or a browser's extension, which no page can imitate.

    Args:
        method: the request's method.
        header: returns a header by its name in lower case.
    """
    if method in ("GET", "HEAD", "OPTIONS"):
        return False
    origin, site = header(b"origin"), header(b"sec-fetch-site")
    scheme, _, place = (origin or b"").lower().partition(b":")
    if scheme not in (b"", b"http", b"https", b"null"):
        return False
    if site is not None:
        return site not in (b"same-origin", b"none")
    return origin is not None and place.removeprefix(b"//") != (header(b"host") or b"").lower()


class RateLimit:
    """A token bucket for each client: a burst, then a steady rate.

    Args:
        per_minute: requests that a client may send in a minute; 0 sets no limit.
        clock: returns monotonic seconds.
        burst: requests that a client may send at once; None is a minute's worth.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        burst: int | None = None,
    ) -> None:
        self._per_minute = per_minute
        self._burst = float(per_minute if burst is None else burst)
        self._clock = clock
        # Tokens of each client and when they were counted; the latest client is at the end.
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> float:
        """Take a token of this client; return 0, or the seconds until there is one."""
        if not self._per_minute:
            return 0.0
        now, level = self._clock(), self._level(client)
        self._levels.pop(client, None)
        if len(self._levels) >= _MOST_CLIENTS:
            del self._levels[next(iter(self._levels))]
        self._levels[client] = (level - (level >= 1), now)
        return self._wait_s(level)

    def wait_s(self, client: str) -> float:
        """Return what `take` would return, without taking a token."""
        return self._wait_s(self._level(client)) if client in self._levels else 0.0

    def _level(self, client: str) -> float:
        now = self._clock()
        level, since = self._levels.get(client, (self._burst, now))
        return min(self._burst, level + (now - since) * self._per_minute / 60)

    def _wait_s(self, level: float) -> float:
        return 0.0 if level >= 1 else (1 - level) * 60 / self._per_minute
