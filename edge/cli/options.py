"""Options that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from edge.bundle.library import (
    bundle_directories,
    checkpoint_bundle,
    find_bundle,
    is_checkpoint,
    remedy,
    roots,
)
from edge.engine_config import EngineConfig, EngineOptions
from edge.errors import ConfigError, RequestError
from edge.files import exists
from edge.layered_settings import read_flags
from edge.runtime.sampling_params import KNOBS, SamplingParams
from edge.settings_fields import field_sections

from .sections import option
from .settings_options import complete_bundle, option_texts, settings_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

Command = TypeVar("Command", bound=Callable[..., Any])


class BundlePath(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A bundle, given by its directory or by a name that `find_bundle` knows.

    Args:
        offers_export: whether to offer an export to a person who names a checkpoint.
    """

    name = "bundle"

    def __init__(self, *, offers_export: bool = False) -> None:
        self._offers_export = offers_export

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Find the bundle, or fail with the error that lists the bundles that there are."""
        path = Path(value)
        if self._offers_export and is_checkpoint(path):
            exported = None if ctx is None else _offer_export(ctx, path)
            if exported is not None:
                return exported
        return find_bundle(str(value))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer bundles by name, and directories, as `complete_bundle` does."""
        return complete_bundle(ctx, param, incomplete)


def _offer_export(ctx: click.Context, path: Path) -> Path | None:
    """Ask a person at a terminal whether to export a checkpoint; return the exported bundle."""
    root, bundle = ctx.find_root().command, checkpoint_bundle(path)
    verb = root.get_command(ctx, "export") if isinstance(root, click.Group) else None
    if verb is None or ctx.resilient_parsing or exists(bundle) or not sys.stdin.isatty():
        return None
    arguments = [str(path), "-o", str(bundle), "--target", "here", "--fast"]
    with redirect_stdout(sys.stderr):  # standard output is reserved for the answer
        verb.main([*arguments, "--dry-run"], "edge-llm export", standalone_mode=False)
        if not click.confirm(f"{path} is a checkpoint. Export it to {bundle} now?", True):
            return None
        if code := verb.main(arguments, "edge-llm export", standalone_mode=False):
            ctx.exit(code)
    return bundle


def only_bundle() -> Path:
    """Find the bundle to use if none is named: the only one below the `roots`.

    Raises:
        ConfigError: there is not exactly one; the message lists them.
    """
    known = list(bundle_directories())
    if len(known) > 1:
        names = ", ".join(directory.name for directory in known)
        raise ConfigError(f"give the name of a bundle, of which there are {len(known)}: {names}")
    if not known:
        where = " or ".join(map(str, roots()))
        raise ConfigError(f"give a bundle: there is none in {where}; {remedy('')}")
    return known[0]


def take_only_bundle() -> Path:
    """Find the bundle for a verb that was given none, and print which one it is.

    Raises:
        ConfigError: `only_bundle` finds none or several.
    """
    found = only_bundle()
    click.echo(f"edge-llm: {found.name}, the only bundle here", err=True)
    return found


FILE = click.Path(path_type=Path, dir_okay=False)
bundle_argument = click.argument("bundle", type=BundlePath())
adapter_option = option(
    "Answer",
    "--adapter",
    metavar="NAME|PATH",
    help="Answer with this adapter: one that edge-llm adapter list shows, or as peft saved it.",
)
json_option = option("Output", "--json", "as_json", is_flag=True, help="Print one JSON line.")

_MANY_ANSWERS = {"num_slots", "max_batch", "queue_capacity", "target_itl_ms", "reuse_prefix"}
ONE_ANSWER = tuple(field.name for field in fields(EngineConfig) if field.name not in _MANY_ANSWERS)
"""Lists the engine's options for a verb that gives one answer at a time."""


def engine_options(*names: str) -> Callable[[Command], Command]:
    """Add these options of `EngineConfig`; `take_engine` reads them."""
    return settings_options(EngineConfig, names)


def take_engine(options: dict[str, Any], **fixed: Unpack[EngineOptions]) -> EngineConfig:
    """Move the options of the engine out of a verb's keyword arguments.

    Args:
        options: the verb's options; those that are not the engine's stay.
        **fixed: values that the verb sets itself.

    Raises:
        ConfigError: `EngineConfig` refuses a value.
    """
    given = {
        field.name: options.pop(field.name)
        for field in fields(EngineConfig)
        if field.name in options
    }
    if given.get("stop_when_sure") and "num_slots" in fixed:
        fixed["num_slots"] += 1  # for the trials
    return read_flags(EngineConfig, given).with_options(**fixed)


def sampling_options(command: Command) -> Command:
    """Add the sampling options; an option that is not given takes the model's default."""
    texts, sections = option_texts(SamplingParams), field_sections(SamplingParams)
    add = option(sections["stop"], "--stop", multiple=True, help=f"{texts['stop']} Repeatable.")
    command = add(command)
    for name, knob in reversed(KNOBS.items()):
        flag = f"--{name.replace('_', '-')}"
        add = option(sections[name], flag, name, type=knob.kind, help=texts[name])
        command = add(command)
    return command


def take_sampling(options: dict[str, Any]) -> SamplingParams:
    """Move the sampling options out of a verb's keyword arguments.

    Raises:
        RequestError: a value is out of range.
    """
    given = {name: options.pop(name) for name in (*KNOBS, "stop")}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def check_utf8(text: str, what: str) -> None:
    """Refuse text of an argument or of standard input whose bytes were not UTF-8.

    Raises:
        RequestError: a byte is not UTF-8; the message calls the text ``what``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF  # surrogateescape keeps it in the low bits
        raise RequestError(
            f"the {what} is not UTF-8: byte 0x{byte:02x} at character {error.start}; convert it, "
            "e.g. with iconv"
        ) from error
