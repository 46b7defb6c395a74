"""Checks settings, the fields of a frozen dataclass, against their types and ranges.

Values of flags, files and the environment are combined in `edge.layered_settings`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from .errors import ConfigError
from .user_paths import expand_user

FINDER = "finder"
"""Key of a `Finder` in a field's metadata."""
Finder = Callable[[str, Path], Path]
"""Finds what a text names; the second argument is the directory of relative paths."""

Section = Literal[
    "Models", "Source", "Server", "Network", "Answer", "Quantization", "Graph", "Task", "Text",
    "Traffic", "Runs", "Comparison", "Thresholds", "Wishes", "Device", "Shapes", "Kernels",
    "Engine", "Memory", "Limits", "Log", "Output", "Help", "Expert",
]  # fmt: skip
"""Lists the sections of a verb's options in their order; only ``--help-all`` shows the last."""
SECTIONS = "SECTIONS"
"""Names the attribute of a settings class that lists by section which fields are options."""


def check_fields(settings: object) -> None:
    """Check every field of a frozen dataclass against its type and the range in ``Annotated``.

    A text becomes a path where a path is needed, and a whole number a float where a float is
    needed. Meant for ``__post_init__``.

    Raises:
        ConfigError: a value has the wrong type or is out of its range.
    """
    for name, hint in field_types(type(settings)).items():
        value = getattr(settings, name)
        object.__setattr__(settings, name, checked(name, value, hint))


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Make the error for an unknown name; it suggests the nearest known one.

    Args:
        what: text with which the message begins.
        name: the name that was given.
        known: the names that are known.
    """
    from .other_names import nearest_name

    return ConfigError(f"{what}; the nearest known one is {nearest_name(name, known, 0.0)!r}")


def field_kind(hint: Any) -> tuple[Any, bool]:
    """Split a field's type into the type without None, and whether None is allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) == 1:
            return options[0], True
    return hint, False


def field_types(cls: Any) -> dict[str, Any]:
    """Read the type of every field, with its ``Annotated`` metadata."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_sections(cls: type) -> dict[str, Section]:
    """Return the section of each field's option; a field without a section has no option."""
    found: dict[str, Section] = {}
    for base in reversed(cls.__mro__):
        for section, names in vars(base).get(SECTIONS, {}).items():
            found |= dict.fromkeys(names, section)
    return found


def checked(
    name: str,
    raw: Any,
    hint: Any,
    *,
    origin: str = "",
    strict: bool = True,
    find: Callable[[str], Path] = expand_user,
) -> Any:
    """Convert the value of a field to its type.

    Args:
        name: the field's name.
        raw: the value as it was given.
        hint: the field's type.
        origin: where the value came from; an error's message begins with it.
        strict: whether to refuse numbers that are text; false reads them.
        find: makes a path of a text.

    Raises:
        ConfigError: the value has another type or is out of its range.
    """

    def to_path(expected: type, given: Any) -> Any:
        if expected is not Path:
            raise NotImplementedError(f"no way to read a {expected}")
        if isinstance(given, Path):
            return given
        if not isinstance(given, str) or not given or "\0" in given:
            raise ValueError(f"a path is needed, got {given!r}")
        return find(given)

    try:
        return msgspec.convert(raw, type=hint, strict=strict, dec_hook=to_path)
    except msgspec.ValidationError as error:
        kind, _ = field_kind(hint)
        message = str(error).replace("$", name)
        if typing.get_origin(kind) is typing.Literal:
            message = f"use {', '.join(typing.get_args(kind))}"
        raise ConfigError(f"{origin}{name} is {raw!r}: {message}") from error
