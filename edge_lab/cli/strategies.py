"""Measures the ways to answer that ``edge-llm eval --ways`` lists, and prints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge.bundle.manifest import read_manifest
from edge.bundle.tasks import check_task
from edge.cli import echo_json
from edge.cli.options import take_engine
from edge.errors import ConfigError
from edge.runtime.sampling_params import SamplingParams
from edge.votes.tally import VoteRule
from edge_lab.measure.report import html_ways_report, way_cells
from edge_lab.measure.strategies import Run, measure_ways
from edge_lab.planner.strategies import WAYS
from edge_lab.plot import load_renderer

from .options import check_writable
from .progress import show_progress
from .tables import make_table

_IDLE = {
    "against": "--against",
    "gate": "--gate",
    "save": "--save",
    "scoring": "--choices",
    "text_file": "--text",
    "tokens": "--tokens",
    "window": "--window",
}


def run_ways(listed: str, confidence: float | None, most: int | None, **options: Any) -> None:
    """Measure each bundle; print and write the results.

    Raises:
        ConfigError: an unknown way, or an option that does not go with ways.
    """
    ways = _checked(listed, confidence, most, options)
    bundles, html_file = options["bundles"], options["html_file"]
    check_writable(html_file, "--html")
    for path in bundles:
        check_task(read_manifest(path), "generate")
    if html_file is not None:
        load_renderer()
    engine = take_engine(options, backend="ort-cpu")
    temperature = options["temperature"]
    params = SamplingParams(
        temperature=0.6 if temperature is None else temperature,
        seed=options["seed"],
        max_tokens=options["max_tokens"] or 1024,
    )
    rule = VoteRule(most=8 if most is None else most)
    with show_progress() as progress:
        results = [
            measure_ways(
                Run(path, engine, params, 0.9 if confidence is None else confidence, rule),
                options["task_file"],
                ways,
                options["limit"],
                progress,
            )
            for path in bundles
        ]
    for result in results:
        echo_json(result) if options["as_json"] else _print(result)
    if html_file is not None:
        _write(html_file, html_ways_report(results))


def _checked(
    listed: str, confidence: float | None, most: int | None, options: dict[str, Any]
) -> list[str]:
    ways = listed.split(",")
    if options["task_file"] is None:
        raise ConfigError("--ways needs --task; leave one of them out")
    for name, flag in _IDLE.items():
        if options[name] not in (None, False):
            raise ConfigError(f"{flag} does not go with --ways; leave one of them out")
    if not set(ways) <= set(WAYS) or len(set(ways)) < len(ways) or "one" not in ways:
        raise ConfigError(f"--ways takes some of {','.join(WAYS)}, with one, not {listed!r:.80}")
    if confidence is not None and not {"stop", "both"} & set(ways):
        raise ConfigError("--stop-when-sure has no effect: --ways has neither stop nor both")
    if {"vote", "both"} & set(ways):
        if options["temperature"] == 0:
            raise ConfigError("--temperature 0 makes all samples of a vote the same; raise it")
    elif most is not None:
        raise ConfigError("--vote has no effect: --ways has neither vote nor both")
    return ways


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    headings, *rows = way_cells(result)
    table = make_table(f"{result['bundle']}, {result['task']['name']}", *headings)
    for row in rows:
        table.add_row(*row)
    Console(markup=False).print(table)


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
