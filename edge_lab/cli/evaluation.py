"""Runs the evaluation that ``edge-llm eval`` asks for: prints, saves and judges the results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec

from edge.backends.ort.session import check_int8_activations
from edge.bundle.library import find_bundle
from edge.bundle.manifest import MANIFEST_NAME, Dialect, read_manifest
from edge.bundle.tasks import check_task
from edge.cli import COMMAND_GROUP, echo_json
from edge.cli.options import take_engine
from edge.errors import (
    EXIT_GATE_MISSED,
    CheckpointError,
    ConfigError,
    DependencyError,
    install_command,
)
from edge.files import exists, is_file
from edge_lab.measure import evaluate as evaluation
from edge_lab.measure.evaluator import Computer, evaluate_task, evaluate_text
from edge_lab.measure.report import figure_rows, html_report, html_task_report
from edge_lab.plot import load_renderer
from edge_make.atomic_swap import update_manifest

from .options import check_writable
from .progress import show_progress
from .tables import make_table

_CURVES = ("kl_by_position", "layers")  # too long for a manifest
_OF_TEXT = {"text_file": "--text", "tokens": "--tokens", "window": "--window"}
_OF_TASK = {
    "limit": "--limit",
    "scoring": "--choices",
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
}


def run_evaluation(
    ctx: click.Context,
    computer: AbstractContextManager[Computer],
    *,
    bundles: tuple[Path, ...],
    against: str | None,
    gate: str | None,
    task_file: Path | None,
    save: bool,
    html_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate with the options of `evaluation_options`; print, save and judge the results.

    The context exits with `EXIT_GATE_MISSED` if a threshold is missed. The computer is entered only
    once the options are known to be sound.
    """
    _refuse_idle_options(task_file, options)
    check_writable(html_file, "--html")
    for path in bundles:
        check_task(read_manifest(path), "generate")
        if save and not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--save writes into {path}, where this user may not; run it as the user that owns "
                "the bundle, or leave --save out"
            )
    gates = [
        None if gate is None else evaluation.load_gate(gate, read_manifest(path).quantization.name)
        for path in bundles
    ]
    for limits in gates:
        if limits is not None:
            evaluation.check_gate(limits, task=task_file is not None, reference=against is not None)
    # A TensorRT engine has one capacity, and a reference would be computed elsewhere.
    engine = take_engine(options, backend="ort-cpu")
    if engine.int8_activations:  # before a reference is exported for minutes
        for path in bundles:
            check_int8_activations(read_manifest(path))
    if html_file is not None and against is not None and task_file is None:
        load_renderer()  # if it is missing, say so before hours of measuring
    with ExitStack() as stack:
        dialect = read_manifest(bundles[0]).dialect  # one that runs where the bundle does
        reference = None if against is None else _reference(against, dialect, stack)
        opened = stack.enter_context(computer)
        given = {name: options[name] for name in (_OF_TEXT if task_file is None else _OF_TASK)}
        given |= {"seed": options["seed"], "progress": stack.enter_context(show_progress())}
        if task_file is None:
            results = evaluate_text(opened, bundles, reference, engine, **given)
        else:
            results = evaluate_task(opened, bundles, reference, engine, task_file, **given)
    for result, limits in zip(results, gates, strict=True):
        if limits is not None:
            measured = result if task_file is None else result["against"]
            missed = list(evaluation.missed_thresholds(limits, measured))
            result["gate"] = {"name": gate, "missed": missed}
    # Print first: a result that cannot be saved is then not lost.
    if as_json:
        for result in results:
            echo_json(result)
    elif task_file is None:
        _print_text(results)
    else:
        _print_task(results)
    if save:
        for path, result in zip(bundles, results, strict=True):
            _save(path, "text" if task_file is None else task_file.name, result)
    if html_file is not None:
        page = html_report(results) if task_file is None else html_task_report(results)
        try:
            html_file.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {html_file}: {error.strerror}") from error
    failed = False
    for result in results:
        for sentence in result.get("gate", {}).get("missed", ()):
            failed = True
            click.echo(f"edge-llm: gate {gate} missed by {result['bundle']}: {sentence}", err=True)
    if failed:
        ctx.exit(EXIT_GATE_MISSED)


def _refuse_idle_options(task_file: Path | None, options: dict[str, Any]) -> None:
    """Refuse an option that the chosen kind of run would ignore."""
    for name, flag in (_OF_TEXT | _OF_TASK).items():
        for_task = name in _OF_TASK
        if options[name] is not None and for_task != (task_file is not None):
            other = "needs --task" if for_task else "does not go with --task"
            raise ConfigError(f"{flag} {other}; leave one of them out")


def _reference(against: str, dialect: Dialect, stack: ExitStack) -> Path:
    """Find the reference's bundle; the verb ``export`` exports a checkpoint to fp16."""
    if is_file(Path(against) / MANIFEST_NAME):
        return Path(against)
    if "/" not in against and not exists(Path(against)):
        return find_bundle(against)
    if not entry_points(group=COMMAND_GROUP, name="export"):
        raise DependencyError(
            f"{against} is no bundle, and exporting it needs the verb export; install it with: "
            f"{install_command('export')}"
        )
    stack.enter_context(_sigterm_exits())
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-llm-reference-"))
    bundle = Path(folder) / "reference"
    click.echo(f"exporting {against} to fp16 as the reference, in {folder}", err=True)
    # A process of its own gives all its memory back before the models are loaded.
    command = [sys.executable, "-m", "edge.cli", "export", against, "-o", str(bundle)]
    command += ["--quant", "fp16", "--dialect", dialect]
    # A SIGTERM that arrives while the export starts is acted on once there is a child to end.
    early: list[int] = []
    leave = signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        try:
            signal.signal(signal.SIGTERM, leave)
            for number in early:
                signal.raise_signal(number)
            code = child.wait()
        finally:
            child.terminate()  # nothing to do after its end
    if code != 0:
        raise CheckpointError(
            f"the reference {against} could not be exported (exit code {code}, see "
            f"above); export it yourself: edge-llm export {against} -o BUNDLE --quant fp16"
        )
    return bundle


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """While active, turn SIGTERM into an ordinary exit, so that temporary files are removed.

    A second SIGTERM ends the process as usual.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# ------------------------------------------------------------------------------- what is printed


def _print_text(results: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(markup=False)
    first = results[0]
    bundles = [Path(result["bundle"]).name for result in results]
    table = make_table(
        f"{first['name']}, {first['tokens']:,} tokens of {first['text']['name']} "
        "(with 95 % intervals)",
        *("", *bundles),
        left=bundles,
    )
    for heading, cells in figure_rows(results):
        shown = [f"{figure} ({interval})" if interval else figure for figure, interval in cells]
        table.add_row(heading, *shown)
    console.print(table)
    for result in results:
        worst = sorted(result["layers"], key=lambda row: -row["key_error"])[:3]
        if worst:
            listed = ", ".join(f"{row['layer']} ({row['key_error']:.3g})" for row in worst)
            console.print(f"{result['bundle']}: worst layers by key error: {listed}")


def _cut(result: dict[str, Any]) -> str:
    return f", {result['cut']} cut short" if result["cut"] else ""


def _print_task(results: list[dict[str, Any]]) -> None:
    for result in results:
        low, high = result["accuracy_interval"]
        click.echo(
            f"{result['bundle']}: {result['correct']} of {result['items']} right, "
            f"{result['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%})"
            + (f", {result['unanswered']} without an answer" if result["unanswered"] else "")
            + _cut(result)
        )
        paired = result.get("against")
        if paired is None:
            continue
        low, high = paired["accuracy_loss_interval"]
        click.echo(
            f"  reference {paired['accuracy']:.1%}{_cut(paired)}; "
            f"loss {paired['accuracy_loss']:+.1%} (95 %: {low:+.1%} to {high:+.1%}; "
            f"{paired['lost']} lost, {paired['won']} won, "
            f"McNemar p = {paired['mcnemar_p']:.3g})"
        )
        for flip in paired["flips"]:
            click.echo(
                f"  line {flip['line']}: expected {flip['expected']}, answer {flip['answer']}, "
                f"reference {flip['answer_reference']}"
            )


# ------------------------------------------------------------------------------- shared


def _save(bundle: Path, kind: str, result: dict[str, Any]) -> None:
    """Put a result under ``quality[kind]``; results of other kinds stay."""
    manifest = read_manifest(bundle)
    stored = {key: value for key, value in result.items() if key not in (*_CURVES, "bundle")}
    quality = {**(manifest.quality or {}), kind: stored}
    update_manifest(bundle, msgspec.structs.replace(manifest, quality=quality))
