"""Reads ``fleet.toml``: where the endpoint listens, who may call, and the devices by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edge.errors import ConfigError
from edge.settings_fields import unknown_name
from edge.user_paths import expand_user
from edge_make.key_file import read_key_file
from edge_serve.config_file import read_toml
from edge_serve.settings import is_loopback

MAX_DEVICES = 1000
DEFAULT_STATE_DIR = "/run/edge-llm-fleet"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:]{2,45}")
_HEADER = re.compile(r"[A-Za-z0-9!#$&'*+.^_|~-]{1,64}")
_FILE = re.compile(r"/[A-Za-z0-9/._+-]{1,200}")
_KEY = re.compile(r"[!#$&(-Z^-~]+")  # no character in it is special to HAProxy
_MAX_STATE_DIR_CHARS = 50  # a device's socket path has to fit into a socket address
_Port = Annotated[int, Meta(ge=1, le=65535)]
_Seconds = Annotated[int, Meta(ge=1, le=86400)]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device of the fleet.

    Attributes:
        url: its ``edge-llm serve``, as the endpoint reaches it: ``http://HOST:PORT``.
        key_file: file on the endpoint with one API key for that service, if it wants keys; best a
            key that no other device has.
        probe_port: the service's ``probe_port``. With it, a device that answers nothing for 4 s is
            cut off, and unanswered requests go to another device; without it, such a device only
            gets no new requests.
        key: the key in ``key_file``, set by `read_config`.
    """

    url: str
    key_file: str | None = None
    probe_port: _Port | None = None
    key: str | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT`` of `url`, as HAProxy writes it."""
        return urlsplit(self.url).netloc

    @property
    def probe_address(self) -> tuple[str, int]:
        """Address of its health probe."""
        url = urlsplit(self.url)
        return url.hostname or "", self.probe_port or url.port or 0


class FleetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of ``fleet.toml``; any other key is refused.

    Attributes:
        host: address at which the endpoint serves.
        port: TCP port of the endpoint.
        certificate: PEM file with key and chain; the endpoint speaks TLS with it.
        api_key_file: file of API keys of the endpoint's clients, as `edge-llm serve` reads it.
        allow_open: serve beyond loopback without keys.
        devices: the devices by name.
        session_header: header that names a session, whose requests stay on one device.
        slots: requests that one device gets at once; more wait at the endpoint.
        max_queue: the most requests that wait; one more is refused with 429.
        queue_s: seconds that one may wait before it is refused with 503.
        answer_s: seconds that an answer, or a silence in a stream, may last; longer than the
            devices' own ``request_timeout_s``.
        retries: how often a request is sent to another device before the first byte of its answer.
        router_port: port of loopback for vllm-router (``edge-llm fleet router``), which then
            chooses the device of chats and completions; None leaves that to HAProxy.
        router_policy: vllm-router's policy for choosing.
        metrics_port: port of loopback for HAProxy's own Prometheus metrics; None opens none.
        state_dir: directory for HAProxy's file and sockets, closed to other users.
        drain_timeout_s: seconds that running requests may continue after ``edge-llm fleet down``.
    """

    host: str = "127.0.0.1"
    port: _Port = 8080
    certificate: str | None = None
    api_key_file: str | None = None
    allow_open: bool = False
    devices: dict[str, Device]
    session_header: str = "x-session-id"
    slots: Annotated[int, Meta(ge=1, le=1024)] = 4
    max_queue: Annotated[int, Meta(ge=1, le=65536)] = 64
    queue_s: _Seconds = 30
    answer_s: _Seconds = 660
    retries: Annotated[int, Meta(ge=0, le=10)] = 2
    router_port: _Port | None = None
    router_policy: Literal["consistent_hash", "cache_aware"] = "consistent_hash"
    metrics_port: _Port | None = None
    state_dir: str = DEFAULT_STATE_DIR
    drain_timeout_s: _Seconds = 30


class _Place(NamedTuple):
    """A place in the fleet's file, for error messages."""

    path: Path
    lines: list[str]

    def error(self, key: str, message: str, table: str | None = None) -> ConfigError:
        return ConfigError(f"{self.path}{self._line(key, table)}: {message}")

    def _line(self, key: str, table: str | None) -> str:
        """Find the line of a key; empty if it is not found, as in an inline table."""
        inside = table is None
        name = rf"(?:{re.escape(key)}|[\"']{re.escape(key)}[\"'])"
        for number, line in enumerate(self.lines, 1):
            header = re.match(r"\s*\[\s*(.+?)\s*\]", line)
            if header is not None:
                path = [part.strip().strip("\"'") for part in header[1].split(".")]
                if table is None and path[-1] == key:
                    return f", line {number}"
                inside = table is not None and path == ["devices", table]
            elif inside and re.match(rf"\s*{name}\s*[=.]", line):
                return f", line {number}"
        return ""


def read_config(path: Path) -> FleetConfig:
    """Read and check a fleet's file, and the key of each device.

    Paths are relative to the file.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or wrong; the message
            names the key, its line and what fits.
        DependencyError: this is Python 3.10 without tomli.
    """
    raw = read_toml(path)
    place = _Place(path, path.read_text("utf-8").splitlines())
    devices = raw.pop("devices", None)
    if not isinstance(devices, Mapping) or not 0 < len(devices) <= MAX_DEVICES:
        raise place.error(
            "devices", f"write a table [devices.NAME] for each device, 1 to {MAX_DEVICES}"
        )
    checked: dict[str, Device] = {}
    for name, table in devices.items():
        checked[name] = device = _device(name, table, place)
        for other in checked:
            if other != name and checked[other].address == device.address:
                raise place.error(
                    "url", f"devices.{name} is the device {other} again; name each once", name
                )
    _check_keys(raw, FleetConfig, place)
    for key in ("certificate", "api_key_file", "state_dir"):
        if isinstance(raw.get(key), str):
            raw[key] = _under(path.parent, raw[key])
    config: FleetConfig = _convert(raw | {"devices": checked}, FleetConfig, place)
    _check(config, place)
    return config


def _under(base: Path, given: str) -> str:
    return str((base / expand_user(given)).absolute())


def _device(name: str, table: Any, place: _Place) -> Device:
    if not _NAME.fullmatch(name):
        raise place.error(
            name, f"the device name {name!r} is not 1 to 32 lower-case letters, digits and hyphens"
        )
    if not isinstance(table, dict):
        raise place.error(name, f"devices.{name} is {table!r}: write a table [devices.{name}]")
    _check_keys(table, Device, place, name)
    if "key" in table:
        raise place.error("key", f"devices.{name}: put the key into a file, its key_file", name)
    if "url" not in table:
        raise place.error(
            name, f"devices.{name} has no url; write where its edge-llm serve is, http://HOST:PORT"
        )
    device: Device = _convert(table, Device, place, name)
    if not _is_url(device.url):
        raise place.error(
            "url", f"devices.{name}.url is {device.url!r}: use http://HOST:PORT", name
        )
    if device.key_file is None:
        return device
    file = _under(place.path.parent, device.key_file)
    return msgspec.structs.replace(device, key_file=file, key=_read_key(Path(file)))


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return False
    plain = text.rstrip("/") == f"http://{url.netloc}" and "@" not in url.netloc
    return plain and bool(port) and _HOST.fullmatch(url.hostname or "") is not None


def _read_key(path: Path) -> str:
    (entry, *more) = read_key_file(path)
    if more or entry.key is None or not _KEY.fullmatch(entry.key):
        raise ConfigError(
            f"{path} does not hold one API key of its device, in full; make one with edge-llm key "
            "NAME: the key goes here as NAME:KEY, its hash into the device's own file"
        )
    return entry.key


def _check_keys(raw: Mapping[str, Any], kind: Any, place: _Place, table: str | None = None) -> None:
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key in raw:
        if key not in known:
            error = unknown_name(f"unknown key {key!r}", key, known)
            raise place.error(key, str(error), table)


def _convert(raw: Any, kind: Any, place: _Place, table: str | None = None) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = re.split(r"[`.\[]", where)[0]
        full = key if table is None else f"devices.{table}.{key}"
        raise place.error(key, f"{full} is {raw.get(key)!r}: {message}", table) from error


def _check(config: FleetConfig, place: _Place) -> None:
    if not _HOST.fullmatch(config.host.strip("[]")):
        raise place.error("host", f"host {config.host!r} is no address to listen on, e.g. 0.0.0.0")
    if config.api_key_file is None and not config.allow_open and not is_loopback(config.host):
        raise place.error(
            "host",
            f"host {config.host} can be reached from other machines, and no API key is set; give "
            "api_key_file, listen on 127.0.0.1, or say allow_open = true",
        )
    if not _HEADER.fullmatch(config.session_header):
        raise place.error("session_header", f"{config.session_header!r} is no name of a header")
    for key in ("certificate", "state_dir"):
        value = getattr(config, key)
        if value is not None and not _FILE.fullmatch(value):
            raise place.error(
                key, f"the path {value!r} has a character that HAProxy would read its own way"
            )
    if len(config.state_dir) > _MAX_STATE_DIR_CHARS:
        raise place.error(
            "state_dir",
            f"the path {config.state_dir} is longer than {_MAX_STATE_DIR_CHARS} characters, so no "
            "socket fits under it; name a shorter one",
        )
    ports = [config.port, config.router_port, config.metrics_port]
    used = [port for port in ports if port is not None]
    if config.router_port is not None:
        used.append(config.router_port + 1)
    if len(set(used)) < len(used):
        raise place.error(
            "router_port", "port, router_port, the one after it, and metrics_port must differ"
        )
