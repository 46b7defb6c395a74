"""``edge-llm embed``: texts to vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edge.cli import echo_json
from edge.cli.options import bundle_argument, check_utf8, engine_options, take_engine
from edge.cli.screen import open_shown
from edge.cli.sections import SectionCommand, option
from edge.errors import RequestError

_OPTIONS = (
    "backend", "kv_capacity", "num_threads", "prefill", "prefill_chunk", "int8_activations",
    "deterministic", "num_slots", "max_batch",
)  # fmt: skip


@click.command(cls=SectionCommand)
@bundle_argument
@click.argument("texts", nargs=-1)
@option(
    "Answer",
    "--prompt-name",
    metavar="NAME",
    help="Which of the model's prompts to put before each text, e.g. query for a question.",
)
@option(
    "Answer",
    "--dimensions",
    type=click.IntRange(min=1),
    help="Leading dimensions to keep, where the model allows it; default: all.",
)
@engine_options(*_OPTIONS)
def embed(
    bundle: Path,
    texts: tuple[str, ...],
    prompt_name: str | None,
    dimensions: int | None,
    **options: Any,
) -> None:
    """Print a vector of BUNDLE for each of TEXTS, or for each line of standard input, as JSON."""
    config = take_engine(options)
    if not texts:
        if sys.stdin.isatty():
            raise RequestError("no text; give one as an argument, or one a line by a pipe")
        # Not splitlines, for which a form feed ends a line, too.
        texts = tuple(sys.stdin.read().removesuffix("\n").split("\n"))
        if "" in texts:
            raise RequestError(
                f"line {texts.index('') + 1} of standard input is empty; each line gets a vector, "
                "so leave it out"
            )
    for text in texts:
        check_utf8(text, "text")
    with open_shown(bundle, config) as llm:
        vectors = llm.embed(texts, prompt_name=prompt_name, dimensions=dimensions)
    for text, vector in zip(texts, vectors.tolist(), strict=True):
        echo_json({"text": text, "embedding": vector})
