"""``edge-llm bundle rollout`` and ``recover``: a device brings itself to a new bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import FILE, engine_options, json_option, take_engine
from edge.cli.sections import SectionCommand, option
from edge.errors import ConfigError
from edge_fleet.registry.reference import Reference
from edge_fleet.rollout import MAX_WATCH_S, PERPLEXITY_RATIO, SWITCH_TIMEOUT_S, WATCH_S
from edge_lab.cli.golden_options import GOLDEN_ENGINE, golden_option, max_tokens_option
from edge_lab.cli.options import Finite, build_option, given_flag
from edge_lab.cli.progress import show_progress
from edge_lab.measure.defaults import GATE_TEXTS

from .registry_options import (
    ReferenceType,
    allow_older_option,
    plain_http_option,
    trusted_keys_option,
)

if TYPE_CHECKING:
    from edge_fleet.rollout.steps import Plan

_link = option(
    "Server",
    "--link",
    type=click.Path(path_type=Path),
    required=True,
    help="The link that the service's settings name; bundles are kept beside it.",
)
_reload = option(
    "Server",
    "--reload",
    "reload_command",
    metavar="COMMAND",
    help="Makes the service look at the link, e.g. 'systemctl reload-or-restart edge-llm@r1', "
    "which also starts one that a bad bundle has ended.",
)


_staging = option(
    "Server",
    "--staging",
    type=click.Path(path_type=Path),
    help="Keep what nobody has accepted yet here, as a user who may not write beside the link: the "
    "unit edge-llm-switch@ takes the bundle over as root, moves the link and reloads.",
)

texts_option = option(
    "Task",
    "--text",
    "texts",
    type=FILE,
    multiple=True,
    default=GATE_TEXTS,
    help="UTF-8 text for the perplexity, in place of the two built-in ones; its beginning is read, "
    "and each of several is judged.",
)
ratio_option = option(
    "Limits",
    "--perplexity-ratio",
    type=Finite(1, 1000),
    default=PERPLEXITY_RATIO,
    show_default=True,
    help="Perplexity over that of what serves above which the new one is rejected; what a manifest "
    "says that its quantization lost is allowed besides.",
)


@click.command(cls=SectionCommand)
@click.argument("reference", type=ReferenceType(), required=False)
@option(
    "Source",
    "--wanted",
    metavar="URL",
    help="In place of REFERENCE: ask this receiver of a fleet what is wanted, begin when this "
    "device's turn has come, and report to it.",
)
@option("Source", "--device-key-file", type=FILE, help="This device's key, for --wanted.")
@_link
@_staging
@option("Server", "--server", metavar="URL", help="The running service: it is asked and watched.")
@option("Server", "--model", help="Its model that is rolled out. Default: the only one.")
@option("Server", "--api-key-file", type=FILE, help="The service's keys; the first one is used.")
@_reload
@option(
    "Task",
    "--gate",
    type=click.Choice(["golden", "perplexity", "none"]),
    default="golden",
    show_default=True,
    help="Hold the new bundle to the old one and to the first that was accepted, before the switch "
    "where memory holds both: by the perplexity of texts, then by a golden set; perplexity leaves "
    "the set out, none both.",
)
@texts_option
@ratio_option
@golden_option
@max_tokens_option
@option(
    "Limits",
    "--watch-s",
    type=Finite(0, MAX_WATCH_S),
    default=WATCH_S,
    show_default=True,
    help="Seconds for which the new bundle is on trial; 0 keeps it as soon as it is served.",
)
@option(
    "Expert",
    "--switch-timeout-s",
    type=Finite(1, MAX_WATCH_S),
    default=SWITCH_TIMEOUT_S,
    show_default=True,
    help="Seconds that the service may take to open a bundle.",
)
@build_option
@option("Source", "--retry", is_flag=True, help="Also try a bundle that was rejected before.")
@allow_older_option
@trusted_keys_option
@plain_http_option
@json_option
@engine_options(*GOLDEN_ENGINE)
def rollout(
    reference: Reference | None,
    wanted: str | None,
    device_key_file: Path | None,
    link: Path,
    staging: Path | None,
    server: str | None,
    model: str | None,
    api_key_file: Path | None,
    reload_command: str | None,
    gate: str,
    texts: tuple[Path, ...],
    perplexity_ratio: float,
    golden: Path,
    max_tokens: int,
    watch_s: float,
    switch_timeout_s: float,
    build: bool | None,
    retry: bool,
    allow_older: bool,
    trusted_keys: Path | None,
    plain_http: bool | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Bring this device to the bundle that REFERENCE means now.

    With --wanted the fleet's receiver says which bundle, or that this device goes back to the one
    before. Pulls, checks the signature, builds, judges, moves the link, watches the service,
    and keeps the new bundle or goes back to the old one. Run it as often as you like: it does
    nothing where nothing is new, and goes on where it was ended.

    Exit code 0: the device has the bundle. 3: it is worse, or was rejected before; the old one
    serves. 75: the registry cannot be reached; the old one serves, try again later. 65: not signed,
    forged or damaged, expired, or an older release than the device had. Any other: a step failed,
    and the old one serves.
    """
    from edge_fleet.rollout.judge import Gate
    from edge_fleet.rollout.service import Service
    from edge_fleet.rollout.steps import Plan, roll_out
    from edge_lab.measure.drift import ROLLOUT_USER
    from edge_lab.measure.watch_server import ServerAnswerer, read_api_key

    watching = ("model", "api_key_file", "watch_s", "switch_timeout_s")
    if server is None and (flag := given_flag(*watching)):
        raise ConfigError(f"{flag} belongs to --server; add it")
    _check_who_reloads(staging, reload_command)
    if staging is not None and allow_older:
        raise ConfigError("--allow-older is for who moves the link: as root, without --staging")
    if server is not None and reload_command is None and staging is None:
        raise ConfigError("--server needs --reload, or the service would never see the new bundle")
    service = None
    if server is not None:
        key = None if api_key_file is None else read_api_key(api_key_file)
        answerer = ServerAnswerer(server, api_key=key, model=model, user=ROLLOUT_USER)
        service = Service(answerer, model)
    asks = gate == "golden"
    judged = Gate(texts, perplexity_ratio, golden if asks else None, max_tokens)
    if (reference is None) == (wanted is None):
        raise ConfigError("give either REFERENCE or --wanted URL")
    if (wanted is None) != (device_key_file is None):
        raise ConfigError("--wanted and --device-key-file belong together")
    plan = Plan(
        reference or Reference("", ""),
        link,
        service,
        reload_command,
        watch_s,
        None if gate == "none" else judged,
        build,
        take_engine(options, num_slots=1, trusted_keys=trusted_keys),
        plain_http,
        retry,
        switch_timeout_s,
        staging,
        allow_older,
    )
    if wanted is not None and device_key_file is not None:
        _poll(plan, wanted, read_api_key(device_key_file), as_json)
        return
    with show_progress() as progress:
        done = roll_out(plan, progress)
    if as_json:
        found = {"digest": done.digest, "bundle": str(done.bundle), "changed": done.changed}
        echo_json({**found, "notes": done.notes})
        return
    click.echo(f"{link}: {done.bundle.name} ({'new' if done.changed else 'as before'})")
    for note in done.notes:
        click.echo(note, err=True)


def _poll(plan: Plan, url: str, key: str, as_json: bool) -> None:
    from edge_fleet.rollout.steps import roll_out
    from edge_fleet.waves.device import Poll, Receiver

    def bring(reference: Reference) -> object:
        with show_progress() as progress:
            return roll_out(replace(plan, reference=reference), progress)

    keys = plan.engine.trusted_keys
    poll = Poll(Receiver(url, key), plan.link, bring, plan.staging, plan.reload, keys)
    report = poll.run(lambda line: click.echo(line, err=True))
    if as_json:
        echo_json(msgspec.to_builtins(report))
    else:
        why = f"; {report.reason}" if report.reason else ""
        click.echo(f"{plan.link}: {report.outcome}, runs {report.running or 'nothing'}{why}")


@click.command(cls=SectionCommand, short_help="Go back to the bundle before this one, at once.")
@_link
@_staging
@_reload
@json_option
def rollback(link: Path, staging: Path | None, reload_command: str | None, as_json: bool) -> None:
    """Go back to the bundle before the one that was kept: it is on the disk, and was accepted once.

    Nothing is fetched, judged or watched. The bundle that is left is not tried again.
    """
    from edge_fleet.rollout.steps import roll_back

    _check_who_reloads(staging, reload_command)
    name = roll_back(link, reload_command, staging)
    if as_json:
        echo_json({"bundle": name})
    else:
        click.echo(f"{link}: {name} again")


@click.command(cls=SectionCommand, short_help="Take back what a roll-out left on trial.")
@_link
@_staging
@_reload
@json_option
def recover(link: Path, staging: Path | None, reload_command: str | None, as_json: bool) -> None:
    """Take back what a roll-out that was ended has left on trial; else do nothing.

    A roll-out has a guard that does so; this is for a service manager that ends the guard too.
    """
    from edge_fleet.rollout.steps import recover as take_back

    _check_who_reloads(staging, reload_command)
    found = take_back(link, reload_command, staging)
    if as_json:
        echo_json({"taken_back": found})
    else:
        click.echo(f"{link}: {'taken back' if found else 'nothing was on trial'}")


def _check_who_reloads(staging: Path | None, reload_command: str | None) -> None:
    if staging is not None and reload_command is not None:
        raise ConfigError(
            "--reload is given to the unit edge-llm-switch@, not with --staging; leave one out"
        )
