"""Options that several verbs share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge.config_file import load_settings
from edge.engine_config import EngineConfig, EngineOptions
from edge.runtime.sampling import SamplingParams

from .settings_options import settings_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

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

_MANY_ANSWERS = {"num_slots", "max_batch", "queue_capacity", "target_itl_ms", "reuse_prefix"}
ONE_ANSWER = tuple(field.name for field in fields(EngineConfig) if field.name not in _MANY_ANSWERS)
"""Options of the engine for a verb that gives one answer at a time."""

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


def engine_options(*names: str) -> Callable[[Command], Command]:
    """Add these options of `EngineConfig`; `take_engine` reads them."""
    return settings_options(EngineConfig, names)


def take_engine(options: dict[str, Any], **fixed: Unpack[EngineOptions]) -> EngineConfig:
    """Move the options of the engine out of a verb's keyword arguments.

    Args:
        options: of the verb; what is not one of the engine's stays.
        **fixed: what the verb itself sets.

    Raises:
        ConfigError: see `EngineConfig`.
    """
    given = {
        field.name: options.pop(field.name)
        for field in fields(EngineConfig)
        if field.name in options
    }
    return load_settings(EngineConfig, flags=given).settings.with_options(**fixed)


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
