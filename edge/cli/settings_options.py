"""Makes a flag of every field of a settings class, so that flags, file and environment agree."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from edge.bundle.library import bundle_directories
from edge.settings_fields import FINDER, Section, field_kind, field_sections

from .sections import option

Command = TypeVar("Command", bound=Callable[..., Any])

_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def complete_bundle(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer names of bundles, and directories."""
    names = [directory.name for directory in bundle_directories()]
    items = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return items or [CompletionItem(incomplete, type="dir")]


def settings_options(
    cls: type, names: Collection[str] | None = None
) -> Callable[[Command], Command]:
    """Add one option per field that has a section (`field_sections`).

    An option that is not given is None, or an empty tuple for tables. Its help is the field's entry
    under ``Attributes:`` in the docstring of its class.

    Args:
        cls: a dataclass with a default for every field.
        names: the fields that get an option; None is all that have a section.
    """
    hints = typing.get_type_hints(cls)
    texts = option_texts(cls)
    sections = field_sections(cls)
    names = sections if names is None else names
    shown = [field for field in dataclasses.fields(cls) if field.name in names]

    def decorate(command: Command) -> Command:
        for field in reversed(shown):
            name = field.name
            command = _option(field, hints[name], texts[name], sections[name])(command)
        return command

    return decorate


def attribute_texts(cls: type) -> dict[str, str]:
    """Read the text on each attribute from the docstrings of a class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(inspect.getmro(cls)):
        after = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        section = re.split(r"\n(?=\S)", after)[0]  # another section may follow
        for names, text in _ENTRY.findall(section):
            for name in names.split(", "):
                texts[name] = " ".join(text.split())
    return texts


def option_texts(cls: type) -> dict[str, str]:
    """Make the help of an option from each attribute's text: a sentence without markup."""
    texts = attribute_texts(cls)
    return {name: text[:1].upper() + text[1:].replace("``", "") for name, text in texts.items()}


def default_text(field: dataclasses.Field[Any]) -> str:
    """Write the default of a field as it follows its help; empty if there is none to name."""
    if any(field.default is none for none in (None, dataclasses.MISSING, False)):
        return ""
    return f"  [default: {'on' if field.default is True else field.default}]"


def _option(
    field: dataclasses.Field[Any], hint: Any, text: str, section: Section
) -> Callable[[Command], Command]:
    kind, _ = field_kind(hint)
    flag = f"--{field.name.replace('_', '-')}"
    text += default_text(field)
    if kind is bool:
        return option(section, f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
    complete = complete_bundle if FINDER in field.metadata else None
    if typing.get_origin(kind) is dict:
        metavar = "NAME=VALUE" if complete is None else "[NAME=]BUNDLE"
        return option(
            section,
            flag,
            field.name,
            multiple=True,
            metavar=metavar,
            help=f"{text} Repeatable.",
            shell_complete=complete,
        )
    if typing.get_origin(kind) is typing.Literal:
        choice = click.Choice(list(typing.get_args(kind)))
        return option(section, flag, field.name, type=choice, help=text)
    # Kept as text, so that the settings read a flag exactly as an environment variable.
    metavar = {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")
    if complete is not None:
        metavar = "BUNDLE"
    return option(section, flag, field.name, metavar=metavar, help=text, shell_complete=complete)
