"""Parses references to a registry's contents: ``HOST[:PORT]/REPOSITORY[:TAG][@sha256:DIGEST]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from edge.errors import ConfigError

# Names, tags and digests have the grammar of the OCI distribution specification 1.1.
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:\[[0-9a-fA-F:.]+\]|{_LABEL}(?:\.{_LABEL})*)(?::[0-9]{{1,5}})?"
_REFERENCE = re.compile(
    rf"(?P<registry>{_HOST})/(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_CHARS = 512


@dataclass(frozen=True)
class Reference:
    """A name for something in a registry.

    Attributes:
        registry: host, and port if one was given.
        repository: path of names.
        tag: a name that may move; None if only a digest was given.
        digest: ``sha256:`` and 64 digits, which mean one content forever; None if none was given.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag = "" if self.tag is None else f":{self.tag}"
        digest = "" if self.digest is None else f"@{self.digest}"
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def wanted(self) -> str:
        """The part to ask for: the digest if there is one, else the tag."""
        return self.digest or self.tag or "latest"

    @property
    def name(self) -> str:
        """The repository's last component, which names a pulled bundle."""
        return self.repository.rpartition("/")[2]

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is this machine."""
        return is_loopback(self.registry)


def parse_reference(text: str) -> Reference:
    """Parse a reference; without tag and digest it has the tag ``latest``.

    It must have a host, since there is no default registry.

    Raises:
        ConfigError: the text is not a reference.
    """
    match = _REFERENCE.fullmatch(text) if len(text) <= MAX_CHARS else None
    if match is None:
        raise ConfigError(
            f"{text[:200]!r} is no reference to a registry; write HOST[:PORT]/NAME:TAG or "
            "HOST[:PORT]/NAME@sha256:DIGEST, the name in lower case"
        )
    port = re.search(r":([0-9]+)$", match["registry"])
    if port is not None and not 0 < int(port[1]) < 1 << 16:
        raise ConfigError(f"{text!r} has the port {port[1]}; ports are 1 to 65535")
    tag, digest = match["tag"], match["digest"]
    if tag is None and digest is None:
        tag = "latest"
    return Reference(match["registry"], match["repository"], tag, digest)


def is_reference(text: str) -> bool:
    """Whether a text must be a reference, and cannot mean a directory."""
    return len(text) <= MAX_CHARS and _REFERENCE.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether a host, with its port if it has one, is this machine."""
    if not host.endswith("]"):
        host = re.sub(r":[0-9]+$", "", host)
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_digest(text: str) -> bool:
    """Whether a text is ``sha256:`` and 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None
