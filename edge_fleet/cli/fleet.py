"""``edge-llm fleet``: many devices behind one endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge.bundle.library import find_bundle
from edge.bundle.manifest import MANIFEST_NAME
from edge.cli import echo_json
from edge.cli.options import json_option
from edge.device.memory import read_available_memory_bytes
from edge.errors import ConfigError, DeadlineError, DependencyError, ResourceError, install_command
from edge_fleet.cli.registry_options import (
    allow_older_option,
    plain_http_option,
    reference_argument,
)
from edge_fleet.devices import cluster
from edge_fleet.devices.client import Fleet
from edge_fleet.devices.config import FleetConfig, read_config
from edge_fleet.devices.errand import Gate
from edge_fleet.devices.haproxy import haproxy
from edge_fleet.devices.rollout import FleetRollout
from edge_fleet.registry.reference import Reference
from edge_fleet.rollout import MAX_WATCH_S, WATCH_S
from edge_lab.cli.eval import evaluation_options
from edge_lab.cli.options import Finite

if TYPE_CHECKING:
    from edge_fleet.devices.evaluation import FleetComputer

_MIN_MEMORY_BYTES = 2**30
_file = click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
_wait = click.option(
    "--wait-s",
    type=Finite(0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for devices.",
)
_json = click.option("--json", "as_json", is_flag=True, help="One line of JSON instead of a table.")


@click.group()
def fleet() -> None:
    """Serve many devices behind one endpoint; FILE is the fleet's TOML file."""


fleet.add_command(haproxy)


@fleet.command(short_help="Start or renew the head on this machine.")
@_file
@_wait
@_json
def up(file: Path, wait_s: float, as_json: bool) -> None:
    """Start the head on this machine, or renew it after a change of FILE."""
    config = read_config(file)
    cluster.start_head(config)
    with contextlib.redirect_stdout(sys.stderr), Fleet(config) as opened:
        opened.deploy()
        status = opened.wait(wait_s)
    _show(status, as_json)
    _judge(status, wait_s)


@fleet.command()
@_file
@click.argument("name")
@_wait
def join(file: Path, name: str, wait_s: float) -> None:
    """Join this machine to the fleet as the device NAME, until SIGTERM.

    The device's own edge-llm serve must run. Where the head is gone, or was started anew, it joins
    again as soon as there is one.
    """
    config = read_config(file)
    if name not in config.devices:
        raise ConfigError(f"{file} has no device {name!r}; it has {', '.join(config.devices)}")
    free = read_available_memory_bytes()
    if free is not None and free < _MIN_MEMORY_BYTES:
        raise ResourceError(
            f"Ray takes about 400 MB of a device, and of its memory {free >> 20} MiB are free; "
            "this device is too small for it: free 1 GiB, or put a proxy before the devices"
        )
    labels = _labels(config, name, wait_s)
    cluster.stay_joined(config, name, labels, lambda line: click.echo(line, err=True))


@fleet.command(short_help="Show every device and what runs there.")
@_file
@_json
def status(file: Path, as_json: bool) -> None:
    """Show every device: its state and why, its models, what runs there."""
    with _connected(file) as opened:
        found = opened.status()
    _show(found, as_json)


@fleet.command(short_help="Send no more requests to a device.")
@_file
@click.argument("name")
@click.option("--off", is_flag=True, help="Send requests there again.")
@click.option(
    "--timeout-s",
    type=Finite(0),
    default=600.0,
    show_default=True,
    help="Seconds that running requests may take.",
)
def drain(file: Path, name: str, off: bool, timeout_s: float) -> None:
    """Send no more requests to the device NAME and wait for those that run there."""
    with _connected(file) as opened:
        if off:
            opened.resume(name)
        else:
            opened.drain(name, timeout_s)


@fleet.command(short_help="Bring every device to a bundle, a few at a time.")
@_file
@reference_argument
@click.option(
    "--canary",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Devices that must end well before any other is touched: the first of FILE.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Devices that roll out at the same time; another ready one is always left.",
)
@click.option(
    "--gate",
    type=click.Choice(["golden", "none"]),
    default="golden",
    show_default=True,
    help="As for edge-llm bundle rollout.",
)
@click.option(
    "--watch-s",
    type=Finite(0, MAX_WATCH_S),
    default=WATCH_S,
    show_default=True,
    help="Seconds for which each device watches the new bundle.",
)
@click.option("--retry", is_flag=True, help="Also try a bundle that was rejected before.")
@allow_older_option
@plain_http_option
@json_option
def rollout(
    file: Path,
    reference: Reference,
    canary: int,
    at_once: int,
    gate: Gate,
    watch_s: float,
    retry: bool,
    allow_older: bool,
    plain_http: bool | None,
    as_json: bool,
) -> None:
    """Bring every device to the bundle that REFERENCE means now, a few at a time.

    Each device rolls it out by itself: judges, watches, and goes back if it is worse. At the first
    one that does not keep it nothing more is begun. Run it again as often as you like: it goes on
    where it was ended, and devices that have the bundle are done at once.

    Exit code 0: every device has the bundle. 3: a device rejected it and serves its old one. 75:
    devices were off, one was lost, or the registry does not answer; call again. Any other: a device
    or the head failed.
    """
    shown: dict[str, tuple[str, str]] = {}
    last: FleetRollout | None = None

    def told(state: FleetRollout) -> None:
        nonlocal last
        if last is None:
            click.echo(f"{state.reference}: begun", err=True)
        last = state
        for name, device in state.devices.items():
            now = (device.state, "" if device.state == "running" else device.said)
            if shown.get(name, ("waiting", "")) != now:
                shown[name] = now
                role = " (canary)" if device.canary else ""
                words = f"; {now[1]}" if now[1] else ""
                click.echo(f"{name}{role}: {device.state}{words}", err=True)

    try:
        with _connected(file) as opened:
            done = opened.rollout(
                reference,
                canary=canary,
                at_once=at_once,
                gate=gate,
                watch_s=watch_s,
                retry=retry,
                allow_older=allow_older,
                plain_http=plain_http,
                told=told,
            )
    finally:
        if as_json and last is not None:
            echo_json(msgspec.to_builtins(last))
    if off := done.where("off"):
        raise DeadlineError(
            f"{', '.join(off)} were off and have to catch up: call again once they are on; all "
            "others have the bundle"
        )
    if not as_json:
        click.echo(f"{done.reference}: on all {len(done.devices)} devices")


@fleet.command("eval", short_help="Measure bundles on all devices at once.")
@_file
@evaluation_options
@click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    help="A device that computes. Repeatable; default: all that have joined.",
)
@click.option(
    "--mix",
    is_flag=True,
    help="Let devices compute together whose CPU or libraries differ; figures may then differ from "
    "one machine's in the last digits.",
)
@click.pass_context
def evaluate(
    ctx: click.Context, /, file: Path, devices: tuple[str, ...], mix: bool, **options: Any
) -> None:
    """Measure BUNDLEs as edge-llm eval does, side by side on the devices of FILE.

    Each window of the text, or question of the task, is computed by one device, on its CPU, while
    its service goes on. Every device needs the bundles, found by their content; this machine, too.
    """
    from edge_lab.cli.evaluation import run_evaluation

    if (against := options["against"]) is not None:
        options["against"] = str(find_bundle(against))
        if not (Path(options["against"]) / MANIFEST_NAME).is_file():
            raise ConfigError(
                f"--against {against} is no bundle, and the devices have to open it; export it "
                f"(edge-llm export {against} -o BUNDLE --quant fp16) and bring it to each of them"
            )
    run_evaluation(ctx, _computer(file, devices, mix), **options)


@contextlib.contextmanager
def _connected(file: Path) -> Iterator[Fleet]:
    # Ray prints what becomes of nodes on stdout, where the answer alone belongs: say it afterwards.
    with contextlib.redirect_stdout(sys.stderr), Fleet.connect(file) as opened:
        yield opened


@contextlib.contextmanager
def _computer(file: Path, devices: tuple[str, ...], mix: bool) -> Iterator[FleetComputer]:
    with _connected(file) as opened:
        told = functools.partial(click.echo, err=True)
        with opened.computer(devices, mix=mix, told=told) as computer:
            yield computer


@fleet.command(short_help="End the head; the devices go on serving.")
@_file
def down(file: Path) -> None:
    """Drain the head and end it; the devices go on serving by themselves."""
    config = read_config(file)
    if cluster.find_head(config) is None:
        raise ConfigError(f"no head of this fleet runs here ({config.address})")
    try:
        with contextlib.redirect_stdout(sys.stderr), Fleet(config) as opened:
            left = opened.close_head()
    finally:
        cluster.stop_head(config)
    if left:
        raise DeadlineError(f"{left} requests were cut short after {config.drain_timeout_s:g} s")


def _labels(config: FleetConfig, name: str, wait_s: float) -> dict[str, str]:
    """Ask the device's own service what it is; Ray shows these labels of a node."""
    try:
        from edge_fleet.devices.device import DeviceAgent
    except ImportError as error:
        raise DependencyError(f"a fleet needs Ray; run: {install_command('fleet')}") from error

    async def look() -> dict[str, Any]:
        device = config.devices[name]
        agent = DeviceAgent(device.url, device.key_file)
        deadline = time.monotonic() + wait_s
        try:
            while (seen := await agent.look())["trouble"] is not None:
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"the service at {device.url} is not ready after {wait_s:g} s: "
                        f"{seen['trouble']}; start it first: edge-llm serve"
                    )
                await asyncio.sleep(0.5)
        finally:
            await agent.close()
        return seen

    seen = asyncio.run(look())
    models = seen["models"].values()
    labels = {
        "edge-llm-kind": seen["kind"],
        "edge-llm-engine": "_".join(sorted({model["backend"] for model in models})),
        "edge-llm-slots": str(sum(model["slots"] for model in models)),
        "edge-llm-machine": platform.machine(),
    }
    return {key: re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:63] for key, text in labels.items()}


def _judge(status: dict[str, Any], wait_s: float) -> None:
    devices = status["devices"]
    refused = [
        f"{name}: {device['reason']}"
        for name, device in devices.items()
        if device["state"] == "refused"
    ]
    if refused:
        raise ConfigError(f"refused, the others serve: {'; '.join(refused)}")
    if not any(device["state"] == "ready" for device in devices.values()):
        raise DeadlineError(
            f"no device is ready after {wait_s:g} s; on each one run: edge-llm fleet join FILE NAME"
        )


def _show(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(status)
        return
    for name, device in status["devices"].items():
        models = ", ".join(
            f"{model}@{facts['sha256'][:12]}" for model, facts in device["models"].items()
        )
        parts = [f"{name}: {device['state']}"]
        parts += [device["reason"]] if device["reason"] else []
        parts += [f"differs: {device['differs']}"] if device["differs"] else []
        if device["kind"]:
            running = f"{device['in_flight']} requests on {device['slots']} slots"
            parts += [device["kind"], f"edge-llm {device['version']}", models or "no models"]
            parts += [running]
        click.echo("; ".join(parts))
