"""``edge-llm watch``: is a bundle, and what clients ask of it, still what it was?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge.cli.options import FILE, BundlePath, engine_options, json_option
from edge.cli.sections import SectionCommand, option
from edge.errors import ConfigError
from edge_lab.measure.defaults import EVAL_TEXT, TEXT_TOKENS
from edge_lab.measure.drift import ALPHA, MIN_PSI, Thresholds

from .golden_options import GOLDEN_ENGINE, golden_option, max_tokens_option
from .options import given_flag

_ASKED = ("golden", "max_tokens", "thinking", "text_file", "text_tokens")


@click.command(cls=SectionCommand)
@click.argument("bundle", required=False, type=BundlePath())
@option("Comparison", "--baseline", type=FILE, help="JSON of an earlier run to compare with.")
@option(
    "Comparison",
    "--against",
    metavar="BUNDLE",
    type=BundlePath(),
    help="A/B: compare with another bundle instead, item by item.",
)
@option(
    "Comparison",
    "--record",
    is_flag=True,
    help="Write --baseline and --traffic instead of comparing.",
)
@option(
    "Comparison",
    "--record-missing",
    is_flag=True,
    help="Write --baseline and --traffic if they are missing; compare with those that exist.",
)
@golden_option
@max_tokens_option
@option(
    "Task",
    "--thinking",
    is_flag=True,
    help="Let the model reason first; give it more --max-tokens then.",
)
@option(
    "Text",
    "--text",
    "text_file",
    type=FILE,
    default=EVAL_TEXT,
    help="UTF-8 text for the perplexity.",
)
@option(
    "Text",
    "--text-tokens",
    type=click.IntRange(0),
    default=TEXT_TOKENS,
    show_default=True,
    help="Tokens of the text; 0 leaves the perplexity out.",
)
@option("Server", "--server", metavar="URL", help="Ask this running server; no BUNDLE is opened.")
@option("Server", "--model", help="Model of the server to ask; default: the server's own.")
@option("Server", "--api-key-file", type=FILE, help="The server's keys; the first one is used.")
@option(
    "Traffic", "--stats", "stats_file", type=FILE, help="A saved answer of /stats, for --traffic."
)
@option(
    "Traffic",
    "--traffic",
    type=FILE,
    help="JSON of what clients usually ask for; the counters of --server or --stats are compared "
    "with it.",
)
@option(
    "Traffic",
    "--state",
    "state_file",
    type=FILE,
    help="Remembers the counters of the last run, so that each run sees new requests only.",
)
@option(
    "Expert",
    "--alpha",
    type=float,
    default=ALPHA,
    show_default=True,
    help="Probability of a false alarm about the traffic, per run.",
)
@option(
    "Expert",
    "--min-psi",
    type=float,
    default=MIN_PSI,
    show_default=True,
    help="Population stability index below which a drift is no alarm.",
)
@option("Output", "--textfile", type=FILE, help="Also write metrics for Prometheus' node exporter.")
@json_option
@engine_options(*GOLDEN_ENGINE)
def watch(
    bundle: Path | None,
    baseline: Path | None,
    against: Path | None,
    record: bool,
    record_missing: bool,
    traffic: Path | None,
    textfile: Path | None,
    as_json: bool,
    alpha: float,
    min_psi: float,
    **options: Any,
) -> int:
    """Compare BUNDLE, or a running --server, with a recorded --baseline.

    Asks a golden set of prompts greedily and measures right answers, refusals, loops, length and
    perplexity; compares what clients ask of a server with --traffic. Exit code 3 is an alarm.
    """
    _check_use(bundle, baseline, against, record or record_missing, traffic, options)

    from .watching import watch_all

    return watch_all(
        bundle,
        baseline,
        against,
        traffic,
        options,
        record=record,
        record_missing=record_missing,
        thresholds=Thresholds(alpha, min_psi),
        textfile=textfile,
        as_json=as_json,
    )


def _check_use(
    bundle: Path | None,
    baseline: Path | None,
    against: Path | None,
    record: bool,
    traffic: Path | None,
    options: dict[str, Any],
) -> None:
    """Refuse options that do not go together, before anything is opened."""
    server, stats = options["server"], options["stats_file"]
    if baseline is None and against is None and traffic is None:
        raise ConfigError("nothing to compare with; give --baseline, --against or --traffic")
    if against is not None and (baseline is not None or record or bundle is None or server):
        raise ConfigError("--against compares two bundles: BUNDLE --against BUNDLE, no --baseline")
    if baseline is not None and (bundle is None) == (server is None):
        raise ConfigError("--baseline needs something to ask: either BUNDLE or --server")
    if bundle is not None and baseline is None and against is None:
        raise ConfigError("BUNDLE is opened for --baseline or --against; add one or leave it out")
    if traffic is not None and (server is None) == (stats is None):
        raise ConfigError("--traffic needs the counters of a server: either --server or --stats")
    if baseline is None and against is None and (flag := given_flag(*_ASKED)):
        raise ConfigError(f"{flag} belongs to --baseline or --against; add one")
    if traffic is None and (flag := given_flag("stats_file", "state_file", "alpha", "min_psi")):
        raise ConfigError(f"{flag} belongs to --traffic; add it")
    if server is None and (options["model"] is not None or options["api_key_file"] is not None):
        raise ConfigError("--model and --api-key-file belong to --server; add it")
    for name in GOLDEN_ENGINE:
        if bundle is None and options[name] is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} belongs to BUNDLE, and none is opened; leave it out")
