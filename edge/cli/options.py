"""Options that several verbs share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from edge.backends.choose import BackendName
from edge.runtime.sampling import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A float in a range. ``nan``, which click lets into every range, is in none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or a usage error."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


bundle_argument = click.argument(
    "bundle", type=click.Path(path_type=Path, exists=True, file_okay=False)
)

_ENGINE = (
    click.option(
        "--backend",
        type=click.Choice(get_args(BackendName)),
        default="auto",
        show_default=True,
        help="Engine that runs the bundle; auto takes the fastest that is there.",
    ),
    click.option(
        "--kv-capacity", type=int, help="Tokens of prompt and answer; default: the bundle's own."
    ),
    click.option(
        "--num-threads",
        type=click.IntRange(1),
        help="CPU threads, with which auto takes the CPU; default: one per physical core.",
    ),
)

int8_activations_option = click.option(
    "--int8-activations/--no-int8-activations",
    default=None,
    help="Let the CPU round activations to int8, its fastest kernel; default: where it can. "
    "Off is many times slower, but exact. GPU engines never do.",
)

_ANSWERING = (
    click.option(
        "--prefill-chunk",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        metavar="TOKENS",
        help="Prompt tokens per step at most; an engine may take fewer.",
    ),
    int8_activations_option,
    click.option(
        "--overflow",
        type=click.Choice(["stop", "slide"]),
        default="stop",
        show_default=True,
        help="When the cache is full: end the answer, or drop old tokens and go on.",
    ),
    click.option(
        "--speculative",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="TOKENS",
        help="Guess up to so many tokens per step from what the text repeats.",
    ),
    click.option(
        "--prefix-dir",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Load prompt beginnings that edge-llm cache has stored there.",
    ),
)

_SAMPLING = (
    click.option("--max-tokens", type=int, help="Tokens to generate at most."),
    click.option("--temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-k", type=int, help="Keep the K likeliest tokens; 0 keeps all."),
    click.option(
        "--top-p", type=float, help="Keep the likeliest tokens of this total probability."
    ),
    click.option("--min-p", type=float, help="Keep tokens this likely relative to the likeliest."),
    click.option(
        "--repetition-penalty", type=float, help="Above 1 discourages tokens seen before."
    ),
    click.option(
        "--presence-penalty", type=float, default=0.0, help="For tokens generated before."
    ),
    click.option("--frequency-penalty", type=float, default=0.0, help="Per time generated before."),
    click.option("--seed", type=int, help="The same seed gives the same answer."),
    click.option("--stop", multiple=True, help="End the answer at this text; may be repeated."),
)

_SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
)


def engine_options(command: Command) -> Command:
    """Add ``--backend``, ``--kv-capacity`` and ``--num-threads``."""
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def answering_options(command: Command) -> Command:
    """Add how answers are computed: prefill, rounding, the cache's end, drafts, prefixes."""
    for option in reversed(_ANSWERING):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """Add the sampling options; what is not given is the model's own default."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def take_sampling(options: dict[str, Any]) -> SamplingParams:
    """Move the sampling options out of a verb's keyword arguments.

    Raises:
        RequestError: a value out of range.
    """
    return SamplingParams(**{name: options.pop(name) for name in _SAMPLING_NAMES})
