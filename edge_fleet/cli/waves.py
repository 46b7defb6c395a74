"""``edge-llm fleet rollout``, ``rollback``, ``progress`` and ``receive``: a fleet in waves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import FILE, json_option
from edge.errors import ConfigError
from edge_fleet.registry.reference import Reference, is_loopback
from edge_fleet.waves.wanted import WAVES, Wanted, seal
from edge_lab.cli.options import ask_password
from edge_make.signing import open_signer

from .registry_options import plain_http_option, reference_argument

if TYPE_CHECKING:
    from edge_fleet.waves.progress import Progress
    from edge_fleet.waves.receiver import State

_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The receiver's directory, with the wanted state, device-keys and reports.",
)
_key = click.option(
    "--key", "key_file", type=FILE, required=True, help="Secret key that signs, as for bundles."
)
_password = click.option(
    "--password-file", type=FILE, help="The key's password; default: it is asked for."
)


@click.command(short_help="Say which bundle the fleet is to have, in waves.")
@reference_argument
@_state
@_key
@_password
@click.option(
    "--waves",
    default=",".join(WAVES),
    show_default=True,
    help="How many devices may have begun, wave after wave: counts and shares of all.",
)
@click.option(
    "--max-failed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="How many devices may fail or reject it before no other begins.",
)
@click.option(
    "--window",
    default="",
    metavar="HOURS",
    help="Local hours of a device in which it begins, e.g. 22-6. Default: any.",
)
@plain_http_option
@json_option
def rollout(
    reference: Reference,
    state: Path,
    key_file: Path,
    password_file: Path | None,
    waves: str,
    max_failed: int,
    window: str,
    plain_http: bool | None,
    as_json: bool,
) -> None:
    """Bring every device to the bundle that REFERENCE means now.

    Devices ask the receiver by themselves (edge-llm bundle rollout --wanted), judge, switch and
    report. A wave begins when each device of the one before has ended; once too many have failed,
    none begins any more. See edge-llm fleet progress.
    """
    from edge_fleet.registry.client import Registry
    from edge_fleet.registry.pull import look
    from edge_fleet.waves.receiver import State

    with Registry(reference, plain_http=plain_http) as registry:
        digest = look(reference, registry, None).digest
    fixed = Reference(reference.registry, reference.repository, None, digest)
    opened = State(state)
    before = opened.wanted()
    parts = tuple(part.strip() for part in waves.split(","))
    wanted = Wanted(
        _next_number(before), str(fixed), "rollout", parts, max_failed=max_failed, window=window
    )
    if before is not None and msgspec.structs.replace(wanted, number=before.number) == before:
        raise ConfigError(f"{fixed} is wanted already, as {before.number}; see fleet progress")
    _publish(opened, wanted, key_file, password_file, as_json)


@click.command(short_help="Have all devices go back to the bundle before, at once.")
@_state
@_key
@_password
@json_option
def rollback(state: Path, key_file: Path, password_file: Path | None, as_json: bool) -> None:
    """Send each device that has the wanted bundle back to the one that it had before.

    That one is on its disk: nothing is fetched or judged, and no wave or window delays it. Each
    device goes back at its next poll. It does not take the bundle again.
    """
    from edge_fleet.waves.receiver import State

    opened = State(state)
    before = opened.wanted()
    if before is None or before.do == "rollback":
        raise ConfigError("nothing is rolled out that a fleet could go back from")
    wanted = Wanted(_next_number(before), before.reference, "rollback")
    _publish(opened, wanted, key_file, password_file, as_json)


@click.command(short_help="Show how far the devices are with what is wanted.")
@_state
@json_option
def progress(state: Path, as_json: bool) -> None:
    """Show which wave is open, and what each device has reported. Exit code 3: it is stopped."""
    from edge_fleet.waves.receiver import State

    found = State(state).progress()
    if as_json:
        echo_json(msgspec.to_builtins(found))
    else:
        click.echo("\n".join(_lines(found)))
    if found.stopped:
        click.get_current_context().exit(3)


@click.command("receive", short_help="Hand out what is wanted, and take reports.")
@_state
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8443, show_default=True)
@click.option("--certificate", type=FILE, help="PEM of the server, for HTTPS.")
@click.option("--certificate-key", type=FILE, help="PEM of its secret key.")
def receive(
    state: Path, host: str, port: int, certificate: Path | None, certificate_key: Path | None
) -> None:
    """Run the fleet's receiver until SIGTERM: the one address that devices dial.

    The file device-keys in the directory has a key of each device, NAME:KEY or NAME:sha256:HEX
    (edge-llm key NAME makes both); a device can report only for itself. No secret key is needed.
    """
    import uvicorn

    from edge_fleet.waves.receiver import State, make_app

    if (certificate is None) != (certificate_key is None):
        raise ConfigError("--certificate and --certificate-key belong together")
    if certificate is None and not is_loopback(host):
        raise ConfigError(
            f"devices would show their keys to the network of {host}; give --certificate, or let a "
            "reverse proxy with TLS ask 127.0.0.1"
        )
    opened = State(state)
    opened.names()
    click.echo(f"{len(opened.names())} devices, at {host}:{port}", err=True)
    uvicorn.run(
        make_app(opened),
        host=host,
        port=port,
        log_level="info",
        ssl_certfile=certificate,
        ssl_keyfile=certificate_key,
    )


def _next_number(before: Wanted | None) -> int:
    # Taken from the clock, so that a lost directory does not lock a fleet out.
    return max(int(time.time()), 0 if before is None else before.number + 1)


def _publish(
    opened: State, wanted: Wanted, key_file: Path, password_file: Path | None, as_json: bool
) -> None:
    key = open_signer(key_file, lambda: ask_password(password_file))
    opened.publish(seal(wanted, key))
    if as_json:
        echo_json(msgspec.to_builtins(wanted))
    else:
        click.echo(f"{wanted.reference}: {wanted.do} {wanted.number}, at the next poll of devices")


def _lines(found: Progress) -> list[str]:
    state = "done" if found.done else f"stopped: {found.stopped}" if found.stopped else "going on"
    lines = [f"{found.reference}: {found.do} {found.number}, {state}"]
    lines += [f"wave {found.wave} of {found.waves} is open"] if found.do == "rollout" else []
    for name, report in found.devices.items():
        if report is None:
            lines.append(f"{name}: nothing yet")
            continue
        running = f", runs {report.running[7:19]}" if report.running else ""
        release = f" release {report.release}" if report.release else ""
        why = f"; {report.reason}" if report.reason else ""
        lines.append(f"{name}: {report.outcome}{running}{release}{why}")
    return lines
