"""``edge-llm eval``: how much quality a bundle has, and how much it has lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edge.cli.options import BundlePath, Command, engine_options
from edge.cli.sections import SectionCommand, option
from edge.cli.settings_options import complete_bundle
from edge.errors import ConfigError
from edge_lab.measure.defaults import WINDOW

_OPTIONS = (
    click.argument(
        "bundles",
        metavar="BUNDLE...",
        nargs=-1,
        required=True,
        type=BundlePath(),
    ),
    option(
        "Comparison",
        "--against",
        metavar="BUNDLE|CHECKPOINT",
        help="Reference: a bundle by directory or name; or a checkpoint (a directory, GGUF file or "
        "hub id), which is exported to fp16 first, into a temporary directory under $TMPDIR.",
        shell_complete=complete_bundle,
    ),
    option(
        "Text",
        "--text",
        "text_file",
        type=click.Path(path_type=Path),
        help="UTF-8 text to read; default: the one that comes with edge-llm.",
    ),
    option("Text", "--tokens", type=click.IntRange(2), help="Tokens of the text; default: all."),
    option(
        "Text", "--window", type=click.IntRange(2), help=f"Tokens per window; default {WINDOW}."
    ),
    option(
        "Thresholds",
        "--gate",
        metavar="NAME|FILE",
        help="Exit with code 3 if a threshold is missed: fp16, int8, int4, recipe (the one that "
        "fits the bundle), or a TOML or JSON file with kl_mean, kl_p99, perplexity_ratio, "
        "top1_agreement, cosine_mean; for a task a file with accuracy_loss. A name judges the "
        "bundle alone, unless --int8-activations leaves that out; a file judges it as served.",
    ),
    option(
        "Task",
        "--task",
        "task_file",
        type=click.Path(path_type=Path),
        help="Answer the questions of this JSONL file instead (MMLU, GSM8K or HumanEval layout).",
    ),
    option("Task", "--limit", type=click.IntRange(1), help="Questions of the task; default: all."),
    option(
        "Task",
        "--choices",
        "scoring",
        type=click.Choice(["letter", "text"]),
        help="How a task's choices compete: by letter (default), or by text per byte.",
    ),
    option("Task", "--max-tokens", type=click.IntRange(1), help="Tokens per answer; default 1024."),
    option(
        "Task",
        "--temperature",
        type=float,
        help="Temperature of generated answers; default 0. R1 was published at 0.6.",
    ),
    option(
        "Expert",
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Seed of the confidence intervals' bootstrap and of sampled answers.",
    ),
    option("Output", "--save", is_flag=True, help="Store the result in the bundle's manifest."),
    option(
        "Output",
        "--html",
        "html_file",
        type=click.Path(path_type=Path),
        help="Write a report here; its charts need the extra report.",
    ),
    option("Output", "--json", "as_json", is_flag=True, help="Print one JSON line per bundle."),
    option(
        "Engine",
        "--int8-activations/--no-int8-activations",
        default=None,
        help="Measure only as the CPU serves INT8 and INT4 weights, with activations rounded to "
        "int8; or only the bundle alone, with float ones, as a TensorRT engine has them. The "
        "default is as served; with --against, a text is then read again for the loss of the "
        "bundle alone, which takes as long again.",
    ),
    engine_options("num_threads"),
)


def evaluation_options(command: Command) -> Command:
    """Add the argument and the options of `evaluate`; `evaluation.run_evaluation` takes them."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command


@click.command("eval", cls=SectionCommand)
@evaluation_options
@option(
    "Task",
    "--batch",
    type=click.IntRange(1),
    help="Answers of a task to generate together; default 1. More are faster, but where two tokens"
    " are almost equally likely an answer may differ from one generated alone.",
)
@option(
    "Task",
    "--ways",
    metavar="LIST",
    help="Answer in each of these ways, and compare right answers per minute, per step and per kJ: "
    "one,stop,vote,both. See docs/vote.md. Temperature: 0.6 by default.",
)
@option(
    "Task",
    "--stop-when-sure",
    type=click.FloatRange(0, 1, min_open=True),
    help="Confidence of the ways stop and both; default 0.9.",
)
@option("Task", "--vote", type=int, help="Most samples of the ways vote and both; default 8.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    batch: int | None,
    ways: str | None,
    stop_when_sure: float | None,
    vote: int | None,
    **options: Any,
) -> None:
    """Measure BUNDLEs on held-out text, or on a task, with --against also what they lost.

    Text: perplexity, KL divergence, top-1 agreement and cosine of the logits, error by layer.
    """
    from edge_lab.measure.evaluator import ThisMachine

    from .evaluation import run_evaluation

    if ways is not None:
        from .strategies import run_ways

        if batch is not None:
            raise ConfigError("--batch does not go with --ways; leave one of them out")
        run_ways(ways, stop_when_sure, vote, **options)
        return
    for flag, value in (("--stop-when-sure", stop_when_sure), ("--vote", vote)):
        if value is not None:
            raise ConfigError(f"{flag} needs --ways; leave one of them out")
    if batch is not None and options["task_file"] is None:
        raise ConfigError("--batch needs --task; leave one of them out")
    run_evaluation(ctx, ThisMachine(batch or 1), **options)
