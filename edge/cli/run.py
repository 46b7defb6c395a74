"""``edge-llm run``: one prompt, one answer."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from edge.bundle.library import bundle_directories
from edge.errors import BundleError, RequestError
from edge.files import exists

from . import echo_json
from .options import (
    FILE,
    ONE_ANSWER,
    BundlePath,
    adapter_option,
    check_utf8,
    engine_options,
    sampling_options,
    take_engine,
    take_only_bundle,
    take_sampling,
)
from .screen import StreamPrinter, format_stats, open_shown
from .sections import SectionCommand, option
from .settings_options import complete_bundle
from .vote_options import answer_json, take_vote, vote_options

_NAME = re.compile(r"[\w.:/~-]*|[./~].*", re.ASCII | re.DOTALL)
"""Matches names and paths of bundles; any other text is a prompt."""


@click.command(cls=SectionCommand)
@click.argument("bundle", required=False, shell_complete=complete_bundle)
@click.argument("prompt", required=False)
@option("Answer", "--system", help="System message; R1 distills are best used without one.")
@option("Answer", "--image", "images", type=FILE, multiple=True, help="A picture to ask about.")
@option(
    "Answer", "--raw", is_flag=True, help="Continue PROMPT as plain text, without chat template."
)
@option(
    "Answer",
    "--suffix",
    metavar="TEXT",
    help="Fill the gap between PROMPT and this text, both plain (code models).",
)
@adapter_option
@option(
    "Output", "--json", "as_json", is_flag=True, help="Print one JSON line instead of streaming."
)
@option("Output", "--no-stats", is_flag=True, help="Do not print speed figures on stderr.")
@vote_options
@engine_options(*ONE_ANSWER)
@sampling_options
@click.pass_context
def run(
    ctx: click.Context,
    /,
    bundle: str | None,
    prompt: str | None,
    system: str | None,
    images: tuple[Path, ...],
    raw: bool,
    suffix: str | None,
    adapter: str | None,
    as_json: bool,
    no_stats: bool,
    **options: Any,
) -> None:
    """Answer PROMPT (or standard input) with BUNDLE, or the only one there is, and stream it.

    Where there is one bundle, edge-llm run "a question" is enough.
    """
    path, prompt = _find(ctx, bundle, prompt)
    params = take_sampling(options)
    vote, slots = take_vote(options)
    config = take_engine(options, num_slots=slots)
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError("no prompt; give one as an argument or pipe it in")
        prompt = sys.stdin.read()
    raw = raw or suffix is not None
    _check_prompt(prompt, raw)
    if raw and (system is not None or images):
        raise RequestError(
            "--system and --image need the chat template, --raw and --suffix work without; drop one"
        )
    content: Any = prompt
    if images:
        content = [{"type": "image", "image": path} for path in images]
        content.append({"type": "text", "text": prompt})
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content})
    with open_shown(path, config) as llm:
        given = prompt if raw else messages
        adapter = adapter and llm.adapters.take(adapter)
        chunks = llm.stream(given, params, suffix=suffix, adapter=adapter, vote=vote)
        if as_json:
            echo_json(answer_json(chunks))
            return
        printer = StreamPrinter()
        for chunk in chunks:
            printer.show(chunk)
        printer.end()
        printer.warn_if_cut_off(llm)
        if printer.stats is not None and not no_stats:
            click.echo(format_stats(printer.stats), err=True)


def _find(ctx: click.Context, name: str | None, prompt: str | None) -> tuple[Path, str | None]:
    """Find the bundle; if only a prompt is given and cannot be a bundle's name, the only one."""
    if name is None:
        return take_only_bundle(), prompt
    try:
        return BundlePath(offers_export=True).convert(name, None, ctx), prompt
    except BundleError as error:
        known = list(bundle_directories())
        if prompt is not None or len(known) != 1 or exists(Path(name)):
            raise
        if not _NAME.fullmatch(name):
            return take_only_bundle(), name
        ask = f'edge-llm run {shlex.quote(known[0].name)} "..."'
        raise BundleError(f"{error} (for a prompt of one word: {ask})") from error


def _check_prompt(prompt: str, raw: bool) -> None:
    """Refuse an empty question: a template would make a prompt of nothing, too."""
    if not raw and not prompt.strip():
        raise RequestError("the prompt is empty; give one as an argument or pipe it in")
    check_utf8(prompt, "prompt")
