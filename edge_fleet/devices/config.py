"""Reads ``fleet.toml``: the head's addresses, who may join and call, and the devices by name."""

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
from edge_lab.key_file import read_key_file
from edge_serve.config_file import read_toml
from edge_serve.settings import is_loopback

DEFAULT_RAY_PORT = 6379
MIN_TOKEN_CHARS = 32
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_Seconds = Annotated[float, Meta(gt=0, le=3600)]
Difference = Literal["version", "bundle", "size"]


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device of the fleet.

    Attributes:
        url: its own ``edge-llm serve``, as the device itself reaches it: on loopback.
        key_file: file on the device with one API key of that service, where it wants keys; the
            fleet's own looks at the device use it.
        rollout: command on the device, word by word, to which ``edge-llm fleet rollout`` appends
            what to roll out; None after `read_config` where no command is named.
    """

    url: str = "http://127.0.0.1:8000"
    key_file: str | None = None
    rollout: tuple[str, ...] | None = None


class FleetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``fleet.toml`` holds; every key that is not one of these is refused.

    Attributes:
        address: HOST:PORT at which Ray's head listens and devices join; an IP address of the head.
        token_file: file with Ray's token, the same on every machine, readable by its owner alone.
            It is needed on loopback, too: told to listen on 127.0.0.1, Ray takes the machine's own
            address instead.
        host: address at which the head serves ``/v1``.
        port: TCP port of ``/v1``.
        api_key_file: file of API keys of the head's clients, as `edge-llm serve` reads it.
        allow_open: serve ``/v1`` beyond loopback without keys.
        max_body_bytes: longest body of a request.
        devices: the devices by name.
        allow: differences between devices that are served all the same: edge-llm's version, the
            hash of a bundle, and a size below ``min_slots`` or ``min_context``.
        min_slots: slots that a device must have.
        min_context: tokens of context that each model of a device must have.
        beat_s: seconds between two looks at a device.
        silent_s: seconds without a sign of life after which a device gets no more requests, and
            those whose answer has not begun go to another one.
        dead_s: seconds without a sign of life after which begun streams end with an error.
        drain_timeout_s: seconds that running requests may go on after `edge-llm fleet down`.
        rollout: that of devices which name none of their own.
    """

    address: str = f"127.0.0.1:{DEFAULT_RAY_PORT}"
    token_file: str
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8000
    api_key_file: str | None = None
    allow_open: bool = False
    max_body_bytes: Annotated[int, Meta(ge=1, le=2**30)] = 4 * 2**20
    devices: dict[str, Device]
    allow: list[Difference] = []
    min_slots: Annotated[int, Meta(ge=1)] = 1
    min_context: Annotated[int, Meta(ge=1)] = 1
    beat_s: _Seconds = 0.5
    silent_s: _Seconds = 3.0
    dead_s: _Seconds = 15.0
    drain_timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    rollout: tuple[str, ...] | None = None

    @property
    def ray_host(self) -> str:
        """The host of `address`."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def ray_port(self) -> int:
        """The port of `address`."""
        return int(self.address.rpartition(":")[2])


class _Place(NamedTuple):
    """The file, for messages."""

    path: Path
    lines: list[str]

    def error(self, key: str, message: str, table: str | None = None) -> ConfigError:
        return ConfigError(f"{self.path}{self._line(key, table)}: {message}")

    def _line(self, key: str, table: str | None) -> str:
        """Find where a key is written; empty where it is not found, as in an inline table."""
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
    """Read and check a fleet's file.

    Paths of the head (``token_file``, ``api_key_file``) are relative to the file; a device's
    ``key_file`` is a path on the device and must be absolute.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or wrong; the message
            names the key, its line and what fits.
        DependencyError: this is Python 3.10 without tomli.
    """
    raw = read_toml(path)
    place = _Place(path, path.read_text("utf-8").splitlines())
    devices = raw.pop("devices", None)
    if not isinstance(devices, Mapping) or not devices:
        raise place.error(
            "devices", "no devices; write a table [devices.NAME] for each one, empty if need be"
        )
    checked = {}
    for name, table in devices.items():
        if not _NAME.fullmatch(name):
            raise place.error(
                name,
                f"the device name {name!r} is not 1 to 63 lower-case letters, digits and hyphens",
            )
        checked[name] = _device(name, table, place)
    _check_keys(raw, FleetConfig, place)
    if "token_file" not in raw:
        raise place.error(
            "token_file",
            "no token_file; whoever reaches a port of Ray runs code here, so make a token, (umask "
            "077; openssl rand -hex 32 > fleet.token), and name its file",
        )
    config: FleetConfig = _convert(raw | {"devices": checked}, FleetConfig, place)
    _check(config, place)
    base = path.parent
    return msgspec.structs.replace(
        config,
        devices={
            name: msgspec.structs.replace(device, rollout=device.rollout or config.rollout)
            for name, device in config.devices.items()
        },
        token_file=_under(base, config.token_file),
        api_key_file=config.api_key_file and _under(base, config.api_key_file),
    )


def check_token(config: FleetConfig) -> None:
    """Make sure that there is a token for Ray.

    Raises:
        ConfigError: there is no such file, others can read it, or it holds no token.
    """
    (entry, *more) = read_key_file(Path(config.token_file))
    if more or entry.key is None or len(entry.key) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"{config.token_file} does not hold one token of at least {MIN_TOKEN_CHARS} "
            "characters; make one: (umask 077; openssl rand -hex 32 > FILE)"
        )


def _under(base: Path, given: str) -> str:
    return str((base / expand_user(given)).absolute())


def _device(name: str, table: Any, place: _Place) -> Device:
    if not isinstance(table, dict):
        raise place.error(name, f"devices.{name} is {table!r}: write a table [devices.{name}]")
    _check_keys(table, Device, place, name)
    device: Device = _convert(table, Device, place, name)
    where = f"devices.{name}."
    url = urlsplit(device.url)
    if url.scheme != "http" or url.path not in ("", "/") or not is_loopback(url.hostname or ""):
        raise place.error(
            "url",
            f"{where}url is {device.url!r}: use http://127.0.0.1:PORT, as the device itself "
            "reaches its service",
            name,
        )
    if device.key_file is not None and not Path(device.key_file).is_absolute():
        raise place.error(
            "key_file",
            f"{where}key_file is {device.key_file!r}: use an absolute path on the device",
            name,
        )
    _check_command(device.rollout, place, name)
    return msgspec.structs.replace(device, url=device.url.rstrip("/"))


def _check_command(
    command: tuple[str, ...] | None, place: _Place, table: str | None = None
) -> None:
    if command is not None and not (command and command[0]):
        raise place.error(
            "rollout",
            "rollout names no command; write its words, "
            '["edge-llm", "bundle", "rollout", "--link", ...]',
            table,
        )


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
    host, _, port = config.address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise place.error(
            "address", f"address is {config.address!r}: use HOST:PORT, e.g. 127.0.0.1:6379"
        )
    if config.api_key_file is None and not config.allow_open and not is_loopback(config.host):
        raise place.error(
            "host",
            f"host {config.host} can be reached from other machines, and no API key is set; give "
            "api_key_file, listen on 127.0.0.1, or say allow_open = true",
        )
    _check_command(config.rollout, place)
    if not config.beat_s < config.silent_s <= config.dead_s:
        raise place.error(
            "silent_s",
            f"beat_s {config.beat_s:g}, silent_s {config.silent_s:g} and dead_s {config.dead_s:g} "
            "must grow in this order",
        )
