"""What an operator may set about the service: limits, times, who may call."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge.backends.choose import BackendName
from edge.errors import ConfigError
from edge.measure.drift import DEFAULT_WINDOW

from .observe.logs import LogFormat

DEFAULT_PORT = 8000
_NAME = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How every bundle of the service is opened; see `edge.runtime.llm.LLM`.

    Attributes:
        backend: engine that runs the bundles.
        kv_capacity: tokens of prompt and answer; the bundle's own by default.
        num_threads: of the CPU backend, which auto then takes; one per physical core by default.
        prefill_chunk: prompt tokens per step at most; an engine may take fewer.
        int8_activations: let the CPU backend round activations to int8, its fastest kernel; where
            it can by default. Off is many times slower, but answers do not depend on what else
            runs. GPU engines keep float activations.
        num_slots: sequences that the KV cache has room for.
        max_batch: sequences that are computed at once; one per slot by default.
        queue_capacity: requests that may wait; one more is answered with 429.
        target_itl_ms: gap between two tokens that must be kept while prompts are read.
        reuse_prefix: keep the cache rows of ended requests for those that begin alike.
        overflow: at the end of the cache, stop, or slide: forget the oldest part and go on.
        speculative: tokens that are guessed ahead at most; 0 is off.
        prefix_dir: directory of prefixes that outlive the process.
    """

    backend: BackendName = "auto"
    kv_capacity: int | None = None
    num_threads: int | None = None
    prefill_chunk: int = 512
    int8_activations: bool | None = None
    num_slots: int = 4
    max_batch: int | None = None
    queue_capacity: int = 64
    target_itl_ms: float | None = None
    reuse_prefix: bool = True
    overflow: Literal["stop", "slide"] = "stop"
    speculative: int = 0
    prefix_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ServerSettings(EngineSettings):
    """Settings of the HTTP service; every one is a flag of ``edge-llm serve``.

    Attributes:
        model: bundles to serve, by name.
        log_format: plain for people, json for machines; auto is plain.
        log_level: debug, info, warning or error.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        api_key_file: one key per line, ``NAME:KEY`` or just the key; without it everyone may call.
        allow_open: listen beyond loopback without a key file.
        default_model: for requests without ``model``, which are refused otherwise.
        auto: rules of the model ``auto``, as MODEL=CONDITION; the first that holds decides.
        split: A/B splits, as NAME=MODEL:SHARE/MODEL:SHARE.
        memory_budget_mb: MiB that all bundles may take together while one replaces another; by
            default a second one is opened beside the first if it fits into the free memory.
        max_body_bytes: of a request.
        max_header_bytes: of a request's head.
        max_nesting: of arrays and objects in a body.
        max_messages: of a chat.
        max_choices: n times the number of prompts.
        max_connections: open at once; more are closed.
        header_timeout_s: from the first byte of a head, or the connection, to its end.
        body_timeout_s: from the head to the end of the body.
        write_timeout_s: a client that takes nothing of what it was sent for so long is cut.
        keep_alive_s: an idle connection is closed after it.
        stream_buffer_bytes: waiting for one slow reader; beyond it the stream is cancelled.
        ping_s: silence on a stream after which a comment is sent.
        request_timeout_s: a generation that takes longer, its wait included, ends with an error.
        rate_limit_rpm: requests per minute and key; 0 is no limit.
        drain_timeout_s: how long running requests may go on after SIGTERM.
        vllm_metrics: also expose the metrics under the names that vLLM has for them.
        drift_baseline: file of what requests usually ask for; a window that differs is an alarm.
        drift_window: requests per comparison with it.
        hot_celsius: a thermal zone at this temperature makes the server not ready.
        stall_s: an engine that has work and ends no step for so long counts as hung; by default
            ten times what a full step takes at the pace of its slowest so far, 5 to 120 s.
    """

    model: dict[str, Path] = field(default_factory=dict)
    log_format: LogFormat = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key_file: Path | None = None
    allow_open: bool = False
    default_model: str | None = None
    auto: dict[str, str] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    memory_budget_mb: int | None = None
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 16 * 2**10
    max_nesting: int = 64
    max_messages: int = 4096
    max_choices: int = 16
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    write_timeout_s: float = 20.0
    keep_alive_s: float = 15.0
    stream_buffer_bytes: int = 256 * 2**10
    ping_s: float = 15.0
    request_timeout_s: float | None = 600.0
    rate_limit_rpm: int = 0
    drain_timeout_s: float = 30.0
    vllm_metrics: bool = False
    drift_baseline: Path | None = None
    drift_window: int = DEFAULT_WINDOW
    hot_celsius: float = 97.0
    stall_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not in 0..65535")
        for name in ("max_body_bytes", "max_header_bytes", "max_nesting", "max_messages"):
            self._at_least(name, 1)
        for name in ("max_choices", "max_connections", "stream_buffer_bytes", "num_slots"):
            self._at_least(name, 1)
        for name in ("kv_capacity", "num_threads", "max_batch", "prefill_chunk"):
            self._at_least(name, 1)
        for name in ("rate_limit_rpm", "drain_timeout_s", "queue_capacity", "speculative"):
            self._at_least(name, 0)
        for name in ("header", "body", "write", "request"):
            self._above_zero(f"{name}_timeout_s")
        for name in ("keep_alive_s", "ping_s", "stall_s", "target_itl_ms"):
            self._above_zero(name)
        if self.max_batch is not None and self.max_batch > self.num_slots:
            raise ConfigError(
                f"max_batch is {self.max_batch}, but there are {self.num_slots} slots; raise "
                "num_slots, or leave max_batch open for one per slot"
            )
        for name in (*self.model, *self.split):
            if not _NAME.fullmatch(name):  # it stands in headers
                raise ConfigError(
                    f"the model name {name!r} is not 1 to 128 printable ASCII characters without "
                    "spaces; name it with --model NAME=BUNDLE"
                )
        if self.api_key_file is None and not self.allow_open and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and no API key is set; "
                "give --api-key-file, listen on 127.0.0.1, or say --allow-open"
            )

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is not None and value < low:
            raise ConfigError(f"{name} is {value}; it must be at least {low}")

    def _above_zero(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value}; it must be greater than 0")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; names other than localhost count as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
