"""Writes a configuration of HAProxy that puts devices behind one address, without Ray.

For devices that have no memory to spare for Ray. What requests belong together is told as
`affinity` tells it, as far as HAProxy can look into a body; see docs/fleet-haproxy.md.
"""

from __future__ import annotations

import ipaddress
import json
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from edge.errors import ConfigError, DependencyError

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_|~-]{1,64}")
_FILE = re.compile(r"[A-Za-z0-9/._+-]{1,200}")
_CHECK_S = 20.0
_USER = "haproxy"

_TEMPLATE = """\
# Written by edge-llm fleet haproxy. Devices:
{listed}
global
{rights}    log stderr format raw local0 notice
    maxconn {max_connections}
    # A body must fit into a buffer to be looked into, and to be sent a second time.
    tune.bufsize 65536
    # After a reload the old process ends its streams; no longer than this.
    hard-stop-after {answer_s}s

defaults
    mode http
    log global
    option httplog
    option dontlognull
    option http-no-delay
    # A device that lost its power is noticed on connections where nothing comes for long.
    option clitcpka
    option srvtcpka
    srvtcpka-idle 20s
    srvtcpka-intvl 5s
    srvtcpka-cnt 3
    timeout http-request 10s
    timeout http-keep-alive 15s
    timeout connect 2s
    timeout queue {queue_s}s
    timeout check 2s
    # A whole answer sends nothing before its end, and a stream at least a comment every 15 s.
    timeout client {answer_s}s
    timeout server {answer_s}s
{errors}
frontend api
    bind {bind}{tls}
    option http-buffer-request
    # Which requests belong together: a session, or the beginning of the prompt; never across keys.
    http-request set-var(txn.of) req.hdr({header})
    http-request set-var(txn.of) req.body,json_query('$.prompt_cache_key') if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var(txn.of) req.body,json_query('$.user') if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var(txn.next) req.body,json_query('$.messages[1].content') if {{ req.body,json_query('$.messages[0].role') -m str system developer }}
    http-request set-var(txn.of) req.body,json_query('$.messages[0].content'),concat(|,txn.next) if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var(txn.of) req.body,bytes(0,1024) if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var-fmt(txn.affinity) "%[req.hdr(authorization)] %[req.hdr(x-api-key)] %[var(txn.of)]"
    http-request return status 503 content-type application/json hdr Retry-After 5 string '{no_device}' if !{{ nbsrv(devices) gt 0 }}
    http-request return status 429 content-type application/json hdr Retry-After 1 string '{full}' if {{ method POST }} {{ queue(devices) ge {max_queue} }}
    default_backend devices

backend devices
    balance hash var(txn.affinity)
    # No hash-balance-factor: with few requests at once it keeps one that was refused from the only
    # device that is left.
    hash-type consistent sdbm avalanche
    option httpchk
    http-check send meth GET uri /ready ver HTTP/1.1 hdr Host localhost
    http-check expect status 200
    # Before the first byte of an answer a request goes to another device: one that refuses the
    # connection, that dies, that drains or loads (503), or whose queue is full (429).
    retries {retries}
    option redispatch 1
    # An answer whose client has left ends at its device, too.
    option abortonclose
    retry-on conn-failure empty-response 429 503
    http-response set-header X-Edge-Device %s
    default-server check{probe_port} inter 1s fastinter 250ms downinter 1s fall 2 rise 1 maxconn {per_device} observe layer4 error-limit 3 on-error fastinter
{servers}
"""  # noqa: E501 - HAProxy knows no continued lines

_RIGHTS = """\
    # Once it listens, without root's rights: the user and directory of Debian's package.
    user {user}
    group {user}
    chroot /var/lib/haproxy
"""


@dataclass(frozen=True)
class Proxied:
    """A device as HAProxy reaches it.

    Attributes:
        name: shown in logs and in the header ``X-Edge-Device``.
        address: ``HOST:PORT`` of its `edge-llm serve`.
    """

    name: str
    address: str


def read_devices(given: Sequence[str]) -> list[Proxied]:
    """Read ``NAME=HOST:PORT``.

    Raises:
        ConfigError: one is written in another way, or is there twice.
    """
    devices: list[Proxied] = []
    for text in given:
        name, _, address = text.partition("=")
        if not _NAME.fullmatch(name) or not _is_address(address):
            raise ConfigError(
                f"{text!r} is no device; write NAME=HOST:PORT, the name in lower-case letters, "
                "digits and hyphens"
            )
        for other in devices:
            if name == other.name or address == other.address:
                raise ConfigError(f"{text} is the device {other.name} again; name each once")
        devices.append(Proxied(name, address))
    if not devices:
        raise ConfigError("there is no device; give NAME=HOST:PORT of each one")
    return devices


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        return False
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            return False
        return True
    return _HOST.fullmatch(host) is not None


def configuration(
    devices: Sequence[Proxied],
    *,
    bind: str = "127.0.0.1:8080",
    certificate: Path | None = None,
    session_header: str = "x-session-id",
    slots: int = 4,
    max_queue: int = 64,
    queue_s: int = 30,
    answer_s: int = 660,
    retries: int = 2,
    probe_port: int | None = None,
    drop_root: bool = True,
) -> str:
    """Write the configuration; `check` asks HAProxy what it thinks of it.

    Args:
        devices: the devices.
        bind: ``HOST:PORT`` of the one address.
        certificate: PEM file with key and chain, for TLS.
        session_header: header that names a session.
        slots: requests that one device runs at once; more wait here.
        max_queue: requests that wait at most; one more is refused with 429.
        queue_s: seconds that one may wait before 503.
        answer_s: seconds that an answer, or a silence in a stream, may last; longer than the
            devices' own ``request_timeout_s``.
        retries: how often a request is tried again before its first byte.
        probe_port: the devices' own ``probe_port``; None asks for their health where requests go.
        drop_root: give up root's rights once it listens; it cannot start without them then.

    Raises:
        ConfigError: a value that cannot stand in it.
    """
    if not _is_address(bind):
        raise ConfigError(f"{bind!r} is no HOST:PORT to listen on, e.g. 0.0.0.0:8080")
    if not _HEADER.fullmatch(session_header):
        raise ConfigError(f"{session_header!r} is no name of a header")
    if certificate is not None and not _FILE.fullmatch(str(certificate)):
        raise ConfigError(f"the path {certificate} has a character that HAProxy would read its way")
    tls = ""
    if certificate is not None:
        tls = f" ssl crt {certificate} alpn h2,http/1.1 ssl-min-ver TLSv1.2"
    errors = [
        (400, "invalid_http", "the proxy could not read the request", None),
        (408, "header_timeout", "the request did not arrive in time", None),
        (502, "device_failed", "the device ended without an answer; try again", 1),
        (503, "queue_timeout", "no device had room in time; try again", 5),
        (504, "answer_timeout", "the device did not answer in the time that is allowed", None),
    ]
    return _TEMPLATE.format(
        rights=_RIGHTS.format(user=_USER) if drop_root else "",
        listed="\n".join(f"#   {device.name} {device.address}" for device in devices),
        max_connections=max(512, 2 * (len(devices) * slots + max_queue)),
        answer_s=answer_s,
        queue_s=queue_s,
        errors="\n".join(_http_error(*each) for each in errors),
        bind=bind,
        tls=tls,
        header=session_header,
        no_device=_envelope(503, "no_device", "no device is ready; try again"),
        full=_envelope(429, "queue_full", "all devices are busy; try again"),
        max_queue=max_queue,
        retries=retries,
        probe_port="" if probe_port is None else f" port {probe_port}",
        per_device=slots,
        servers="\n".join(f"    server {device.name} {device.address}" for device in devices),
    )


def _http_error(status: int, code: str, message: str, retry_after_s: int | None) -> str:
    after = "" if retry_after_s is None else f" hdr Retry-After {retry_after_s}"
    body = _envelope(status, code, message)
    return f"    http-error status {status} content-type application/json{after} string '{body}'"


def _envelope(status: int, code: str, message: str) -> str:
    """OpenAI's form of an error; nothing in it needs HAProxy's quotes."""
    kind = {400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error})


def check(text: str) -> None:
    """Let HAProxy itself read a configuration, but for a user that this machine does not have.

    Raises:
        DependencyError: it is not installed.
        ConfigError: it refuses it.
    """
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise DependencyError(
            "haproxy is not installed, so the configuration cannot be checked; run: apt-get "
            "install haproxy, or give --no-check and check it where it runs"
        )
    try:
        pwd.getpwnam(_USER)
    except KeyError:  # the machine where it runs has the package, and with it the user
        text = text.replace(_RIGHTS.format(user=_USER), "")
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(text)
        file.flush()
        ran = subprocess.run(
            [program, "-c", "-f", file.name],
            capture_output=True,
            text=True,
            timeout=_CHECK_S,
            check=False,
        )
    if ran.returncode or "WARNING" in ran.stderr:
        said = (ran.stderr or ran.stdout).strip().replace(file.name, "haproxy.cfg")
        raise ConfigError(f"{program} refuses the configuration:\n{said}")


@click.command(short_help="Write a configuration of HAProxy for the devices.")
@click.argument("devices", nargs=-1, required=True, metavar="NAME=HOST:PORT...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write."
)
@click.option(
    "--bind",
    default="127.0.0.1:8080",
    show_default=True,
    metavar="HOST:PORT",
    help="Address of all devices together.",
)
@click.option(
    "--certificate",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True),
    help="PEM file with key and chain, for TLS.",
)
@click.option(
    "--session-header",
    default="x-session-id",
    show_default=True,
    help="Header that names a session, whose requests stay on one device.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 1024),
    default=4,
    show_default=True,
    help="Requests that one device runs at once.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 65536),
    default=64,
    show_default=True,
    help="Requests that wait at most; one more gets 429.",
)
@click.option(
    "--queue-s",
    type=click.IntRange(1, 3600),
    default=30,
    show_default=True,
    help="Seconds that a request may wait for a device.",
)
@click.option(
    "--answer-s",
    type=click.IntRange(1, 86400),
    default=660,
    show_default=True,
    help="Seconds that an answer may take; longer than the devices' --request-timeout-s.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 10),
    default=2,
    show_default=True,
    help="How often a request is tried again before its first byte.",
)
@click.option(
    "--probe-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="The devices' --probe-port, where a busy one answers, too; none by default: their health "
    "is asked where requests go.",
)
@click.option(
    "--drop-root/--no-drop-root",
    default=True,
    help="Let HAProxy give up root's rights once it listens, for the user haproxy of Debian's "
    "package; not where it is started without them.  [default: on]",
)
@click.option(
    "--check/--no-check", "checks", default=True, help="Let HAProxy read it first.  [default: on]"
)
def haproxy(
    devices: tuple[str, ...],
    output: Path | None,
    bind: str,
    certificate: Path | None,
    session_header: str,
    slots: int,
    max_queue: int,
    queue_s: int,
    answer_s: int,
    retries: int,
    probe_port: int | None,
    drop_root: bool,
    checks: bool,
) -> None:
    """Write a configuration of HAProxy for devices that have no memory for Ray.

    Each NAME=HOST:PORT is a device's own edge-llm serve.
    """
    text = configuration(
        read_devices(devices),
        bind=bind,
        certificate=certificate,
        session_header=session_header,
        slots=slots,
        max_queue=max_queue,
        queue_s=queue_s,
        answer_s=answer_s,
        retries=retries,
        probe_port=probe_port,
        drop_root=drop_root,
    )
    if checks:
        check(text)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}; name another file") from error
