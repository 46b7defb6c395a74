"""Defines the settings of the service: limits, times, who may call."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from edge.bundle.library import find_setting
from edge.engine_config import EngineConfig
from edge.errors import ConfigError
from edge.settings_fields import FINDER, Section, field_sections
from edge_lab.measure.drift import DEFAULT_WINDOW

from .observe.logs import LogFormat

DEFAULT_PORT = 8000
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAME = re.compile(r"[!-~]{1,128}")
_NUMBER = re.compile(r"[+-]?\d{1,12}(\.\d{0,9})?(e[+-]?\d{1,2})?", re.ASCII)
_MOST_TIME_CHARS = 100
_DURATION_PART = re.compile(r"(\d{1,12}(?:\.\d{0,9})?)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)", re.ASCII)
_DURATION = re.compile(rf"[+-]?({_DURATION_PART.pattern})+", re.ASCII)
_UNITS_S = {
    "ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0,
    "h": 3600.0,
}  # fmt: skip
_Positive = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]
_Port = Annotated[int, Meta(ge=0, le=65535)]
_Seconds = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True, kw_only=True)
class ServerSettings(EngineConfig):
    """Settings of the HTTP service, the engine's included.

    Each is a key of its file and of the environment; those in `SECTIONS` are flags, too.

    Attributes:
        model: bundles to serve, by the names that requests use. A bundle is a directory or one of
            the names of edge-llm list; a BUNDLE alone is served under its directory's name.
        log_format: format of the log: plain for people, json for machines; auto is plain.
        log_level: least severity that is logged.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        probe_port: TCP port on which a separate thread answers /health and /ready, even while the
            event loop is busy; there is none by default, and 0 takes a free one.
        api_key_file: file of API keys, one per line as ``NAME:KEY`` or just the key; without it
            everyone may call.
        allow_open: listen beyond loopback without a key file.
        default_model: model for requests that name none, which are refused otherwise.
        auto: rules of the model ``auto``, as MODEL=CONDITION; the first that holds decides.
        split: A/B splits, as NAME=MODEL:SHARE/MODEL:SHARE.
        keep_alive: time without requests after which a model is unloaded, as 5m, 1h30m or seconds;
            the next request loads it. 0 unloads it after each answer; by default, as with -1, it
            stays until another model needs its memory.
        memory_budget_mb: MiB that all loaded bundles may take together, while one replaces another,
            too; by default the free memory is what there is. One bundle is loaded in any case.
        admin_keys: names of the API keys that may load and unload models by hand, and say how long
            they stay.
        adapter_dir: directory below which /v1/load_lora_adapter may read; by default it reads none.
        key_adapters: adapters that an API key may use, as KEY=ADAPTER,ADAPTER; a key that is not
            here may use all.
        max_body_bytes: longest body of a request, without its pictures.
        max_images: most pictures of a request.
        max_image_bytes: most bytes of all pictures of a request together; if a model that reads
            pictures is served, a body may be longer by 4/3 of it.
        image_urls: fetch pictures that requests name by an address, from public machines only.
        max_inflight_body_bytes: bytes of all bodies whose requests have not ended, and as many of
            what runs in the background; one client may have a quarter of them, and the first 16 KiB
            of each body are free.
        max_header_bytes: longest head of a request, all its headers together.
        max_nesting: most levels of arrays and objects in a body.
        unknown_fields: refuse unknown fields of a request, or ignore and count them, for a gateway
            in front that adds its own.
        max_messages: most messages of a chat.
        max_choices: most answers of one request: n times the number of prompts.
        max_connections: connections that are open at once, or fewer where the limit of open files
            is lower; a new one replaces the one that has waited longest for its client.
        max_connections_per_address: connections of one address (of IPv6 of one network of 64 bits)
            that are open at once.
        max_connections_per_key: requests that one API key may have under way at once.
        trusted_proxies: addresses or networks of proxies that say in the header x-edge-client whose
            request it is; it counts instead of their address where there is no key.
        text_queue_capacity: long requests (bodies of 32 KiB or more) that wait to be read and
            encoded, which happens one after the other; more are refused.
        text_timeout_s: seconds that a request may wait and take to be encoded.
        header_timeout_s: seconds from the first byte of a head, or from the connection, to the end
            of the head.
        body_timeout_s: seconds from the head to the end of the body.
        write_timeout_s: seconds after which a client that reads nothing is cut.
        idle_connection_s: seconds after which an idle connection is closed.
        stream_buffer_bytes: bytes that may wait for one slow reader, besides 256 KiB in the kernel;
            with more the stream is cancelled.
        ping_s: seconds of silence on a stream after which a comment is sent.
        request_timeout_s: seconds that a generation may take, its wait included, before it ends
            with an error.
        rate_limit_rpm: requests per minute and key; 0 is no limit.
        rate_limit_address_rps: requests per second and address (of IPv6 of one network of 64 bits),
            or of what a trusted proxy says in x-edge-client, probes and refused ones included; ten
            seconds' worth may come at once; 0 is no limit.
        drain_timeout_s: seconds that running requests may continue after SIGTERM.
        responses_dir: directory in which /v1/responses stores responses, and those that continue
            after a restart; by default the last ones are kept in memory where only this machine can
            ask, and nothing elsewhere.
        vllm_metrics: also expose the metrics under the names that vLLM has for them.
        drift_baseline: file of what requests usually ask for; a window that differs is an alarm.
        drift_window: requests per comparison with the drift_baseline.
        hot_celsius: temperature of a thermal zone at which the server is not ready.
        stall_s: seconds after which an engine that has work and ends no step counts as hung; by
            default ten times what a full step takes at the pace of its slowest so far, 5 to 120 s.
    """

    model: dict[str, Path] = field(default_factory=dict, metadata={FINDER: find_setting})
    log_format: LogFormat = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    host: str = "127.0.0.1"
    port: _Port = DEFAULT_PORT
    probe_port: _Port | None = None
    api_key_file: Path | None = None
    allow_open: bool = False
    default_model: str | None = None
    auto: dict[str, str] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    keep_alive: str | None = None
    memory_budget_mb: _Count | None = None
    admin_keys: list[str] = field(default_factory=list)
    adapter_dir: Path | None = None
    key_adapters: dict[str, str] = field(default_factory=dict)
    max_body_bytes: _Positive = 4 * 2**20
    max_images: _Positive = 10
    max_image_bytes: _Positive = 8 * 2**20
    image_urls: bool = False
    max_inflight_body_bytes: _Positive = 64 * 2**20
    max_header_bytes: _Positive = 16 * 2**10
    max_nesting: _Positive = 64
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    max_messages: _Positive = 4096
    max_choices: _Positive = 16
    max_connections: _Positive = 1024
    max_connections_per_address: _Positive = 256
    max_connections_per_key: _Positive = 128
    trusted_proxies: list[str] = field(default_factory=list)
    text_queue_capacity: _Positive = 16
    text_timeout_s: _Seconds = 30.0
    header_timeout_s: _Seconds = 10.0
    body_timeout_s: _Seconds = 10.0
    write_timeout_s: _Seconds = 20.0
    idle_connection_s: _Seconds = 15.0
    stream_buffer_bytes: _Positive = 256 * 2**10
    ping_s: _Seconds = 15.0
    request_timeout_s: _Seconds | None = 600.0
    rate_limit_rpm: _Count = 0
    rate_limit_address_rps: _Count = 200
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 30.0
    responses_dir: Path | None = None
    vllm_metrics: bool = False
    drift_baseline: Path | None = None
    drift_window: int = DEFAULT_WINDOW
    hot_celsius: Annotated[float, Meta(gt=0)] = 97.0
    stall_s: _Seconds | None = None

    SECTIONS: ClassVar[dict[Section, tuple[str, ...]]] = {
        "Models": ("model", "default_model", "keep_alive"),
        "Network": ("host", "port", "probe_port", "api_key_file", "allow_open"),
        "Limits": (
            "max_body_bytes", "max_connections", "request_timeout_s", "rate_limit_rpm",
            "drain_timeout_s",
        ),
        "Log": ("log_format", "log_level"),
        "Expert": (
            "auto", "split", "memory_budget_mb", "responses_dir", "vllm_metrics", "drift_baseline",
            "unknown_fields", "image_urls",
        ),
    }  # fmt: skip
    """Sections of a verb's help with their options; a setting in no section is a key only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*self.model, *self.split):
            if not _NAME.fullmatch(name):  # it is sent in headers
                raise ConfigError(
                    f"the model name {name!r} is not 1 to 128 printable ASCII characters without "
                    "spaces; name it with --model NAME=BUNDLE"
                )
        _ = self.proxy_networks, self.keep_alive_s
        if self.port and self.port == self.probe_port:
            raise ConfigError(
                f"port and probe_port are both {self.port}; give another --probe-port"
            )
        if self.max_inflight_body_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_inflight_body_bytes, {self.max_inflight_body_bytes}, is less than one body "
                f"may have (max_body_bytes, {self.max_body_bytes}); raise it or lower that"
            )
        for setting in ("admin_keys", "key_adapters"):
            if (names := getattr(self, setting)) and self.api_key_file is None:
                raise ConfigError(
                    f"{setting} names {', '.join(names)}, and there are no API keys; give "
                    f"--api-key-file, too, or leave {setting} out"
                )
        if self.api_key_file is None and not self.allow_open and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and no API key is set; "
                "give --api-key-file, listen on 127.0.0.1, or say --allow-open"
            )

    @property
    def most_body_bytes(self) -> int:
        """The longest body if a model reads pictures, which come in base64."""
        longest = self.max_body_bytes + -(-self.max_image_bytes // 3) * 4
        return min(longest, self.max_inflight_body_bytes)

    @property
    def keep_alive_s(self) -> float:
        """``keep_alive`` in seconds; infinite if no time unloads a model.

        Raises:
            ConfigError: it is not a time.
        """
        if self.keep_alive is None:
            return math.inf
        try:
            return parse_keep_alive(self.keep_alive)
        except ValueError as error:
            raise ConfigError(f"keep_alive is {self.keep_alive!r}: {error}") from None

    @property
    def proxy_networks(self) -> list[Network]:
        """The addresses in ``trusted_proxies``.

        Raises:
            ConfigError: one is not an address.
        """
        try:
            return [ipaddress.ip_network(proxy) for proxy in self.trusted_proxies]
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies is {self.trusted_proxies}: {error}; name addresses or networks, "
                "for example 10.0.0.2 or 10.0.0.0/24"
            ) from error

    @property
    def engine(self) -> EngineConfig:
        """The part of the settings that opens each bundle."""
        return EngineConfig(
            **{field.name: getattr(self, field.name) for field in fields(EngineConfig)}
        )


def keys_without_option() -> list[str]:
    """Name the settings that are keys of the file and of the environment only."""
    sections = field_sections(ServerSettings)
    return [field.name for field in fields(ServerSettings) if field.name not in sections]


def parse_keep_alive(given: str | float) -> float:
    """Read how long a model stays, as Ollama does: a duration of Go, or seconds.

    Args:
        given: e.g. ``5m``, ``1h30m``, ``500ms``, 300 or ``300``; a negative value means forever.

    Returns:
        Seconds; infinite for forever.

    Raises:
        ValueError: it is neither.
    """
    text = str(given)
    if len(text) > _MOST_TIME_CHARS:
        raise ValueError(f"a time has at most {_MOST_TIME_CHARS} characters")
    if _NUMBER.fullmatch(text):
        seconds = float(text)
    elif _DURATION.fullmatch(text):
        parts = _DURATION_PART.findall(text)
        seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
        seconds = -seconds if text.startswith("-") else seconds
    else:
        raise ValueError("write a time such as 5m, 1h30m or 300 (seconds), or -1 for ever")
    return math.inf if seconds < 0 else seconds


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; names other than localhost count as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
