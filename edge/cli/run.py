"""``edge-llm run``: one prompt, one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edge.errors import RequestError

from . import echo_json
from .options import (
    ONE_ANSWER,
    bundle_or_checkpoint_argument,
    check_utf8,
    engine_options,
    sampling_options,
    take_engine,
    take_sampling,
)
from .screen import StreamPrinter, format_stats, open_shown
from .sections import SectionCommand, option


@click.command(cls=SectionCommand)
@bundle_or_checkpoint_argument
@click.argument("prompt", required=False)
@option("Answer", "--system", help="System message; R1 distills are best used without one.")
@option(
    "Answer", "--raw", is_flag=True, help="Continue PROMPT as plain text, without chat template."
)
@option(
    "Answer",
    "--suffix",
    metavar="TEXT",
    help="Fill the gap between PROMPT and this text, both plain (code models).",
)
@option(
    "Output", "--json", "as_json", is_flag=True, help="Print one JSON line instead of streaming."
)
@option("Output", "--no-stats", is_flag=True, help="Do not print speed figures on stderr.")
@engine_options(*ONE_ANSWER)
@sampling_options
def run(
    bundle: Path,
    prompt: str | None,
    system: str | None,
    raw: bool,
    suffix: str | None,
    as_json: bool,
    no_stats: bool,
    **options: Any,
) -> None:
    """Answer PROMPT (or standard input) with BUNDLE, or the only one there is, and stream it."""
    params = take_sampling(options)
    config = take_engine(options, num_slots=1)
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError("no prompt; give one as an argument or pipe it in")
        prompt = sys.stdin.read()
    raw = raw or suffix is not None
    _check_prompt(prompt, raw)
    if raw and system is not None:
        raise RequestError(
            "--system needs the chat template, --raw and --suffix work without; drop one"
        )
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    with open_shown(bundle, config) as llm:
        given = prompt if raw else messages
        if as_json:
            result = llm.generate(given, params, suffix=suffix)
            echo_json(
                {
                    "text": result.text,
                    "reasoning": result.reasoning,
                    "finish_reason": result.finish_reason,
                    "stats": result.stats.as_dict(),
                }
            )
            return
        printer = StreamPrinter()
        for chunk in llm.stream(given, params, suffix=suffix):
            printer.show(chunk)
        printer.end()
        printer.warn_if_cut_off(llm)
        if printer.stats is not None and not no_stats:
            click.echo(format_stats(printer.stats), err=True)


def _check_prompt(prompt: str, raw: bool) -> None:
    """Refuse what is no question: a template would make one of nothing, too."""
    if not raw and not prompt.strip():
        raise RequestError("the prompt is empty; give one as an argument or pipe it in")
    check_utf8(prompt, "prompt")
