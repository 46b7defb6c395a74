"""``edge-llm fleet``: many devices behind one endpoint."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import json_option
from edge.errors import DeadlineError
from edge_fleet.devices import endpoint
from edge_fleet.devices.config import read_config

from .waves import progress, receive, rollback, rollout

_file = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))


@click.group()
def fleet() -> None:
    """Serve many devices behind one endpoint; FILE is the fleet's TOML file.

    The verbs with --state bring devices to a bundle, wave by wave, and need no endpoint.
    """


for _each in (rollout, rollback, progress, receive):
    fleet.add_command(_each)


@fleet.command(short_help="Write and check HAProxy's configuration.")
@_file
def check(file: Path) -> None:
    """Write HAProxy's configuration into FILE's state_dir, and let HAProxy check it."""
    config = read_config(file)
    click.echo(f"{endpoint.write(config, file)}: good, {len(config.devices)} devices")


@fleet.command(short_help="Run the endpoint on this machine.")
@_file
def up(file: Path) -> None:
    """Write HAProxy's configuration, check it, and run HAProxy in place of this process.

    SIGTERM ends it, `edge-llm fleet down` lets running answers end first, and `edge-llm fleet
    reload` takes over a change of FILE. Its log has a line of JSON for every request.
    """
    endpoint.run(read_config(file), file)


@fleet.command(short_help="Run vllm-router beside the endpoint.")
@_file
def router(file: Path) -> None:
    """Run vllm-router in place of this process; FILE names its router_port.

    While it runs, it chooses the device for chats and completions; otherwise HAProxy does.
    """
    endpoint.run_router(read_config(file), file)


@fleet.command("reload", short_help="Take over a change of FILE or of keys.")
@_file
def reload_(file: Path) -> None:
    """Apply changes of FILE and its files of keys; no request fails because of it."""
    endpoint.reload(read_config(file), file)


@fleet.command(short_help="Show every device and what runs there.")
@_file
@json_option
def status(file: Path, as_json: bool) -> None:
    """Show every device: its state and why, its requests, its edge-llm and models.

    Exit code 75: no device is ready, or no endpoint runs.
    """
    found = endpoint.status(read_config(file))
    if as_json:
        echo_json({"devices": msgspec.to_builtins(found)})
    else:
        for name, device in found.items():
            click.echo(_line(name, device))
        if len({tuple(sorted(each.models.items())) for each in found.values() if each.version}) > 1:
            click.echo("devices serve different models or bundles", err=True)
    if not any(device.state == "ready" for device in found.values()):
        raise DeadlineError(f"no device is ready; on this machine runs: edge-llm fleet up {file}")


@fleet.command(short_help="End the endpoint; the devices go on serving.")
@_file
def down(file: Path) -> None:
    """Stop the endpoint once running answers have ended; the devices continue to serve."""
    config = read_config(file)
    if left := endpoint.stop(config):
        raise DeadlineError(f"{left} requests were cut short after {config.drain_timeout_s} s")


def _line(name: str, device: endpoint.DeviceState) -> str:
    parts = [f"{name}: {device.state}"]
    parts += [device.reason] if device.reason else []
    parts += [f"{device.running} running, {device.waiting} waiting"]
    if device.version is None:
        parts += ["does not say what it serves"]
    else:
        models = ", ".join(f"{model}@{digest}" for model, digest in device.models.items())
        parts += [f"edge-llm {device.version}", models or "no models"]
    return "; ".join(parts)
