"""``edge-llm batch``: a file of requests, answered here or by a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.cli.options import FILE, take_engine
from edge.cli.sections import SectionCommand, option
from edge.cli.settings_options import complete_bundle, settings_options
from edge.engine_config import EngineConfig
from edge.errors import EXIT_GATE_MISSED, ConfigError
from edge.layered_settings import read_flags
from edge_lab.cli.options import Finite, given_flag
from edge_lab.cli.progress import show_progress
from edge_serve.batch import TIMEOUT_S, WAIT_S
from edge_serve.settings import ServerSettings

if TYPE_CHECKING:
    from edge_serve.batch import BatchResult

_STOPPED = 130


@click.command(cls=SectionCommand)
@click.argument("source", metavar="REQUESTS", type=FILE)
@option("Output", "-o", "--output", type=FILE, required=True, help="File of the answers.")
@option(
    "Output",
    "--errors",
    type=FILE,
    help="File of the rows that failed; by default the answers' name with .errors.jsonl.",
)
@option(
    "Models",
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]BUNDLE",
    help="Bundle to open here, by the name that requests use. Repeatable.",
    shell_complete=complete_bundle,
)
@option(
    "Server", "--url", help="Server of OpenAI's API to ask instead, e.g. http://127.0.0.1:8000."
)
@option("Server", "--api-key-file", type=FILE, help="The server's keys; the first one is used.")
@option(
    "Limits",
    "--concurrency",
    type=click.IntRange(1, 1024),
    help="Requests at once; by default one more than there are slots, or 4 where a server does not "
    "say.",
)
@option(
    "Limits",
    "--wait-s",
    type=Finite(0),
    default=WAIT_S,
    show_default=True,
    help="Seconds to wait for a server that is gone or has no room.",
)
@option(
    "Limits",
    "--timeout-s",
    type=Finite(1),
    help=f"Seconds that one answer may take; by default {TIMEOUT_S:g} with --url, no limit with "
    "--model.",
)
@settings_options(EngineConfig)
def batch(
    source: Path,
    output: Path,
    errors: Path | None,
    models: tuple[str, ...],
    url: str | None,
    api_key_file: Path | None,
    concurrency: int | None,
    wait_s: float,
    timeout_s: float | None,
    **options: Any,
) -> int:
    """Answer a file of REQUESTS in OpenAI's Batch format, with --model here or by --url.

    Answers are appended as they come. After an interruption the same command resumes. Exit code 3:
    rows failed.
    """
    from edge_lab.measure.watch_server import read_api_key
    from edge_serve.batch import run_batch

    if bool(models) == (url is not None):
        raise ConfigError(
            "a batch asks either the bundle of --model or the server of --url; "
            + ("leave one of them out" if models else "give one of them")
        )
    given = sorted(name for name, value in options.items() if value is not None)
    if url is not None and given:
        unused = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{unused} belongs to --model, and --url opens no bundle; leave it out")
    if url is None and (flag := given_flag("api_key_file", "wait_s")):
        raise ConfigError(f"{flag} belongs to --url, and --model asks no server; leave it out")
    found = read_flags(ServerSettings, {"model": models}).model
    with show_progress() as progress:
        result = run_batch(
            source,
            output,
            models=found,
            url=url,
            errors=errors,
            api_key=None if api_key_file is None else read_api_key(api_key_file),
            engine=None if url is not None else take_engine(options),
            concurrency=concurrency,
            wait_s=wait_s,
            timeout_s=timeout_s,
            progress=progress,
        )
    click.echo(_summary(result, output, errors), err=True)
    if result.stopped:
        return _STOPPED
    return EXIT_GATE_MISSED if result.failed else 0


def _summary(result: BatchResult, output: Path, errors: Path | None) -> str:
    from edge_serve.batch.run import default_errors

    parts = [f"{result.answered:,} of {result.rows:,} rows answered in {output}"]
    if result.failed:
        parts.append(f"{result.failed:,} failed, with why in {errors or default_errors(output)}")
    if result.stopped:
        parts.append(f"stopped with {result.left:,} left; the same command goes on")
    return "; ".join(parts)
