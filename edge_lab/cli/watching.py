"""Runs ``edge-llm watch``: asks, counts, compares with the baseline, and reports what changed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from edge.cli import echo_json
from edge.cli.options import take_engine
from edge.errors import EXIT_GATE_MISSED, DependencyError, EdgeError, install_command
from edge.files import exists
from edge.runtime.llm import LLM
from edge_lab.measure import evaluate
from edge_lab.measure.compare import CHUNK_TOKENS, compare
from edge_lab.measure.drift import (
    MIN_REQUESTS,
    Counts,
    Drift,
    Thresholds,
    read_counts,
    write_atomic,
)
from edge_lab.measure.drift import compare as compare_traffic
from edge_lab.measure.watch import (
    Answerer,
    Baseline,
    BundleAnswerer,
    Check,
    check_asked,
    compare_runs,
    eval_text,
    perplexity,
    read_baseline,
    read_golden,
    run_golden,
    write_baseline,
)
from edge_lab.measure.watch_server import (
    ServerAnswerer,
    TrafficState,
    read_api_key,
    read_state,
    read_stats_file,
)
from edge_make.progress import Progress, prefixed, uncounted

from .options import check_writable
from .progress import show_progress


@dataclass
class _Outcome:
    """Findings of one run."""

    checks: list[Check]
    drift: dict[str, Drift]
    notes: list[str]
    requests: int = 0

    @property
    def alarms(self) -> list[str]:
        names = [check.name for check in self.checks if check.alarm]
        return names + [f"drift of {name}" for name, drift in self.drift.items() if drift.alarm]


def watch_all(
    bundle: Path | None,
    baseline: Path | None,
    against: Path | None,
    traffic: Path | None,
    options: dict[str, Any],
    *,
    record: bool,
    record_missing: bool,
    thresholds: Thresholds,
    textfile: Path | None,
    as_json: bool,
) -> int:
    """Watch with the verb's options, which were checked before; return the exit code."""

    def records(path: Path) -> bool:
        return record or (record_missing and not exists(path))

    # Report a bad file before hours of asking.
    before = None if baseline is None or records(baseline) else read_baseline(baseline)
    usual = None if traffic is None or records(traffic) else read_counts(traffic)
    state_file: Path | None = options["state_file"]
    state = TrafficState() if state_file is None else read_state(state_file)
    for path, option in (
        (baseline if before is None else None, "--baseline"),
        (traffic if usual is None else None, "--traffic"),
        (state_file, "--state"),
        (textfile, "--textfile"),
    ):
        check_writable(path, option)
    options["engine"] = take_engine(options, prefill_chunk=CHUNK_TOKENS)
    outcome = _Outcome([], {}, [])
    counters = None if traffic is None else _counters(options)
    failure: EdgeError | None = None
    try:
        _ask_models(outcome, bundle, baseline, against, before, options)
    except EdgeError as error:
        failure = error  # what clients ask for is still worth comparing
    if traffic is not None and counters is not None:
        _watch_traffic(outcome, traffic, counters, usual, thresholds, state)
        if state_file is not None:
            write_atomic(state_file, msgspec.json.encode(state))
    for path, figures in ((baseline, outcome.checks), (traffic, outcome.drift.values())):
        if path is not None and any(figure.alarm for figure in figures):
            outcome.notes.append(
                f"if that is how it should be now, remove {path}; --record-missing writes it anew"
            )
    # After a failure the old file stays: its time shows that it is old.
    if textfile is not None and failure is None:
        write_atomic(textfile, _prometheus(outcome))
    if traffic is not None or failure is None:
        _report(outcome, as_json)
    if failure is not None:
        raise failure
    return EXIT_GATE_MISSED if outcome.alarms else 0


# ------------------------------------------------------------------------------- golden set


def _open(bundle: Path, options: dict[str, Any], progress: Progress) -> LLM:
    with uncounted(progress, f"{bundle.name}: open"):
        return LLM(bundle, options["engine"])


def _ask_models(
    outcome: _Outcome,
    bundle: Path | None,
    baseline: Path | None,
    against: Path | None,
    before: Baseline | None,
    options: dict[str, Any],
) -> None:
    """Let the models answer, and compare; ``before`` is the baseline, None if it is recorded."""
    if against is not None:
        assert bundle is not None
        with show_progress() as progress:
            outcome.checks, facts = _compare_bundles(bundle, against, options, progress)
        outcome.notes.append(facts)
    elif baseline is not None:
        if before is not None:  # refuse before hours of asking, too
            items, sha256 = read_golden(options["golden"])
            ids = [item.id for item in items]
            check_asked(before, sha256, ids, options["max_tokens"], thinking=options["thinking"])
        with show_progress() as progress:
            run = _run(bundle, options, progress)
        if before is None:
            write_baseline(baseline, run)
            outcome.notes.append(f"recorded {len(run.items)} answers in {baseline}")
        else:
            outcome.checks = compare_runs(run, before)


def _ask(answerer: Answerer, name: str, options: dict[str, Any], progress: Progress) -> Baseline:
    items, sha256 = read_golden(options["golden"])
    results = run_golden(answerer, items, options["max_tokens"], progress)
    return Baseline(name, sha256, options["max_tokens"], results, options["thinking"])


def _run(bundle: Path | None, options: dict[str, Any], progress: Progress) -> Baseline:
    tokens, path = options["text_tokens"], options["text_file"]
    if bundle is None:
        server = _server(options)
        run = _ask(server, options["model"] or options["server"], options, progress)
        if tokens == 0:
            return run
        text = server.eval_text(path, tokens)
        return _with_perplexity(run, server.perplexity(text, progress), text)
    with _open(bundle, options, progress) as llm:
        answerer = BundleAnswerer(llm, thinking=options["thinking"])
        run = _ask(answerer, llm.manifest.name, options, progress)
        if tokens == 0:
            return run
        text = eval_text(llm, path, tokens)
        return _with_perplexity(run, perplexity(llm, text, progress), text)


def _with_perplexity(run: Baseline, value: float, text: evaluate.EvalText) -> Baseline:
    return msgspec.structs.replace(
        run, perplexity=value, text_sha256=text.sha256, text_tokens=text.num_scored
    )


def _compare_bundles(
    bundle: Path, against: Path, options: dict[str, Any], progress: Progress
) -> tuple[list[Check], str]:
    """Let both answer the same items, and compare the texts' perplexities token by token."""
    with ExitStack() as stack:
        paths = (bundle, against)
        ours, theirs = (stack.enter_context(_open(path, options, progress)) for path in paths)
        runs = [
            _ask(
                BundleAnswerer(llm, thinking=options["thinking"]),
                llm.manifest.name,
                options,
                prefixed(progress, f"{path.name}: "),
            )
            for llm, path in zip((ours, theirs), paths, strict=True)
        ]
        checks = compare_runs(runs[0], runs[1])
        if options["text_tokens"] == 0:
            return checks, "perplexity left out"
        if ours.manifest.model.vocab_size != theirs.manifest.model.vocab_size:
            return checks, "other vocabularies: perplexities cannot be compared"
        text = eval_text(ours, options["text_file"], options["text_tokens"])
        result = ours.call(
            lambda: theirs.call(lambda: compare(ours, theirs, text.windows, progress))
        )
    figures = evaluate.summarize(result.positions)
    interval = evaluate.confidence_intervals(result.positions).get("perplexity_ratio")
    if interval is None:
        return checks, "too few --text-tokens: perplexities cannot be compared"
    low, high = interval
    now, then = figures["perplexity"], figures["perplexity_reference"]
    assert now is not None
    assert then is not None
    checks.append(Check("perplexity", now, then, alarm=low > 1.02))
    return checks, f"ratio of the perplexities: 95 % interval {low:.4f} to {high:.4f}"


# ------------------------------------------------------------------------------- traffic


def _server(options: dict[str, Any]) -> ServerAnswerer:
    key_file = options["api_key_file"]
    return ServerAnswerer(
        options["server"],
        api_key=None if key_file is None else read_api_key(key_file),
        model=options["model"],
        thinking=options["thinking"],
    )


def _counters(options: dict[str, Any]) -> Counts:
    stats_file = options["stats_file"]
    return _server(options).counts() if stats_file is None else read_stats_file(stats_file)


def _watch_traffic(
    outcome: _Outcome,
    traffic: Path,
    now: Counts,
    usual: Counts | None,
    thresholds: Thresholds,
    state: TrafficState,
) -> None:
    """Compare the traffic between two runs with the usual one; record it if ``usual`` is None."""
    window = now.since(state.seen).plus(state.pending)
    outcome.requests = window.requests
    state.pending = Counts()
    if window.requests < MIN_REQUESTS:
        outcome.notes.append(f"{window.requests} new requests; {MIN_REQUESTS} are needed")
        state.pending = window
    elif usual is None:
        write_atomic(traffic, msgspec.json.encode(window))
        outcome.notes.append(f"recorded {window.requests} requests in {traffic}")
    else:
        outcome.drift = compare_traffic(usual, window, thresholds)
    # The counts of the start: clients went on asking since, and the server does not count us.
    state.seen = now


# ------------------------------------------------------------------------------- output


def _report(outcome: _Outcome, as_json: bool) -> None:
    if as_json:
        echo_json(
            {
                "alarms": outcome.alarms,
                "checks": msgspec.to_builtins(outcome.checks),
                "drift": msgspec.to_builtins(outcome.drift),
                "requests": outcome.requests,
                "notes": outcome.notes,
            }
        )
        return
    for check in outcome.checks:
        p_value = "" if check.p_value is None else f", p {check.p_value:.3g}"
        flips = f": {', '.join(check.flips)}" if check.flips else ""
        _line(
            check.alarm, f"{check.name} {check.value:.4g}, was {check.baseline:.4g}{p_value}{flips}"
        )
    for name, drift in outcome.drift.items():
        _line(drift.alarm, f"drift of {name}: PSI {drift.psi:.3f}, p {drift.p_value:.3g}")
    for note in outcome.notes:
        click.echo(note)


def _line(alarm: bool, text: str) -> None:
    click.echo(f"{'ALARM' if alarm else 'ok   '} {text}")


def _prometheus(outcome: _Outcome) -> bytes:
    """Write the metrics in Prometheus' text format."""
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError as error:
        raise DependencyError(
            f"--textfile needs prometheus-client; run: {install_command('serve')}"
        ) from error
    registry = CollectorRegistry()

    def gauge(name: str, text: str, label: str, values: dict[str, float]) -> None:
        family = Gauge(f"edgellm_watch_{name}", text, [label], registry=registry)
        for key, value in values.items():
            family.labels(key).set(value)

    checks = {check.name: check for check in outcome.checks}
    gauge("value", "Figure now.", "check", {n: c.value for n, c in checks.items()})
    gauge("baseline", "Figure then.", "check", {n: c.baseline for n, c in checks.items()})
    gauge("psi", "Drift of requests.", "param", {n: d.psi for n, d in outcome.drift.items()})
    alarms = {name: float(check.alarm) for name, check in checks.items()}
    alarms |= {f"drift_{name}": float(drift.alarm) for name, drift in outcome.drift.items()}
    gauge("alarm", "1 if the figure is too far off.", "check", alarms)
    last = Gauge("edgellm_watch_timestamp_seconds", "When it ran.", registry=registry)
    last.set(time.time())
    text: bytes = generate_latest(registry)
    return text
