"""``edge-llm adapter push``, ``pull``, ``rollout``, ``rollback``: adapters alone in a registry.

Verbs that need no registry are in `edge_lab.cli.adapter`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.cli import echo_json
from edge.cli.options import BundlePath, engine_options, json_option, take_engine
from edge.cli.sections import SectionCommand, option
from edge_fleet.registry.reference import Reference
from edge_lab.cli.adapter import adapter as adapter
from edge_lab.cli.golden_options import GOLDEN_ENGINE, golden_option, max_tokens_option
from edge_lab.cli.progress import show_progress

from .registry_options import plain_http_option, reference_argument, trusted_keys_option
from .rollout import ratio_option, texts_option

if TYPE_CHECKING:
    from edge_fleet.rollout.judge import Gate

_GATE = ("texts", "perplexity_ratio", "golden", "max_tokens")
_bundle = click.argument("bundle", type=BundlePath())
_name = option("Task", "--name", help="Name of the adapter; default: the reference's name.")


@adapter.command(short_help="Send an adapter to a registry.")
@click.argument("path", type=click.Path(path_type=Path))
@reference_argument
@plain_http_option
@json_option
def push(path: Path, reference: Reference, plain_http: bool | None, as_json: bool) -> None:
    """Send an adapter to a registry as REFERENCE, with its signature if it has one.

    PATH is the directory that peft saved, or the file of its weights.
    """
    from edge_fleet.registry.adapter import push as send
    from edge_fleet.registry.client import Registry

    with Registry(reference, plain_http=plain_http) as registry:
        done = send(path, reference, registry)
    place = f"{reference.registry}/{reference.repository}@{done.digest}"
    if as_json:
        echo_json({"reference": place, **done._asdict()})
        return
    unsigned = "" if done.signed else "; it is not signed (SHA256SUMS.minisig)"
    click.echo(f"{place}: {done.num_bytes / 1e6:,.3f} MB{unsigned}")


@adapter.command(short_help="Get an adapter from a registry.")
@reference_argument
@_bundle
@_name
@trusted_keys_option
@plain_http_option
@json_option
def pull(reference: Reference, bundle: Path, name: str | None, **options: Any) -> None:
    """Get the adapter REFERENCE from a registry, check it and put it beside BUNDLE.

    One of that name is replaced in one step, and kept for edge-llm adapter rollback.
    """
    _bring(reference, bundle, name, None, options)


@adapter.command(cls=SectionCommand, short_help="Get an adapter if it is no worse than the old.")
@reference_argument
@_bundle
@_name
@option(
    "Task",
    "--gate",
    "measure",
    type=click.Choice(["golden", "perplexity"]),
    default="golden",
    show_default=True,
    help="Hold the new adapter to the one of its name, to BUNDLE alone where there is none, and to "
    "the first that was accepted: by the perplexity of texts, then by a golden set; perplexity "
    "leaves the set out.",
)
@texts_option
@ratio_option
@golden_option
@max_tokens_option
@option("Source", "--retry", is_flag=True, help="Also try an adapter that was rejected before.")
@trusted_keys_option
@plain_http_option
@json_option
@engine_options(*GOLDEN_ENGINE)
def rollout(reference: Reference, bundle: Path, name: str | None, **options: Any) -> None:
    """Bring an adapter of BUNDLE to what REFERENCE means now, if it is no worse than the old one.

    It is judged in this process, as edge-llm bundle rollout judges bundles, and a server takes it
    with the next answer. BUNDLE is what the server's settings name. Run it as often as you like.

    Exit code 0: the device has the adapter. 3: it is worse, or was rejected before. 75: the
    registry cannot be reached. 65: it does not fit BUNDLE, or is not signed, forged or damaged.
    Except with 0, the old adapter continues to serve.
    """
    from edge_fleet.rollout.judge import Gate

    gate = Gate(**{key: options.pop(key) for key in _GATE})
    if options.pop("measure") == "perplexity":
        gate = replace(gate, golden=None)
    _bring(reference, bundle, name, gate, options)


def _bring(
    reference: Reference, bundle: Path, name: str | None, gate: Gate | None, options: dict[str, Any]
) -> None:
    from edge_fleet.registry.client import Registry
    from edge_fleet.rollout.adapter import roll_out

    plain_http, as_json = options.pop("plain_http"), options.pop("as_json")
    retry = options.pop("retry", False)
    engine = take_engine(options, num_slots=1, trusted_keys=options.pop("trusted_keys"))
    name = reference.name if name is None else name
    with Registry(reference, plain_http=plain_http) as registry, show_progress() as progress:
        asked = (reference, registry, bundle, name, gate, engine)
        done = roll_out(*asked, retry=retry, progress=progress)
    if as_json:
        found = {"name": name, "digest": done.digest, "path": str(done.bundle)}
        echo_json({**found, "changed": done.changed})
        return
    click.echo(f"{name}: {done.bundle.name} ({'new' if done.changed else 'as before'})")


@adapter.command(short_help="Go back to the adapter before this one, at once.")
@click.argument("name")
@_bundle
def rollback(name: str, bundle: Path) -> None:
    """Go back to the adapter NAME of BUNDLE before the one that was put in place last.

    It is on the disk. The one that is left is not rolled out again.
    """
    from edge_fleet.rollout.adapter import roll_back

    click.echo(f"{name}: {roll_back(bundle, name)} again")
