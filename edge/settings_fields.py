"""Settings as fields of a frozen dataclass: their types, ranges and conversion from flags.

A table (``model``) is written ``name=value,name=value`` in one text, a list ``value,value``. A
field whose metadata has a `Finder` takes names beside paths, and in a table of them a value alone
has the name of the directory that was found. Files and the environment are in
`edge_serve.config_file`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from .errors import ConfigError, EdgeError
from .user_paths import expand_user

FINDER = "finder"
"""Key of a `Finder` in a field's metadata."""
_PATH_BEGINS = ("/", "./", "../", "~")  # a name may have a slash in it, as owner/model
Finder = Callable[[str, Path], Path]
"""Finds what a text names; the second argument is what a relative path is relative to."""

Section = Literal[
    "Models", "Source", "Server", "Network", "Answer", "Quantization", "Graph", "Task", "Text",
    "Traffic", "Runs", "Comparison", "Thresholds", "Wishes", "Device", "Shapes", "Kernels",
    "Engine", "Memory", "Limits", "Log", "Output", "Help", "Expert",
]  # fmt: skip
"""Sections of a verb's options, in the order of its help; only ``--help-all`` shows the last."""
SECTIONS = "SECTIONS"
"""Attribute of a class of settings: by section the fields that are options. Others are none."""

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Resolved(Generic[Settings]):
    """Settings, and where each value came from.

    Attributes:
        settings: all settings, checked.
        origins: origin of each field's value: ``default``, ``file PATH``, ``environment NAME`` or
            ``flag --NAME``.
    """

    settings: Settings
    origins: dict[str, str]


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where."""

    raw: Any
    origin: str
    base: Path | None = None  # what a relative path is relative to
    is_text: bool = False  # numbers arrive as text


def read_flags(cls: type[Settings], flags: Mapping[str, Any]) -> Settings:
    """Make settings from flags alone.

    Args:
        cls: a frozen dataclass with a default for every field.
        flags: flags by field name; None and an empty tuple mean that a flag was not given.

    Raises:
        ConfigError: a value has the wrong type or is out of its range.
    """
    return resolve(cls, given_flags(flags, field_types(cls))).settings


def resolve(cls: type[Settings], values: Mapping[str, Given]) -> Resolved[Settings]:
    """Convert every value to its field's type, and keep where it came from.

    Raises:
        ConfigError: a value has the wrong type or is out of its range.
    """
    fields = field_types(cls)
    finders = {field.name: field.metadata.get(FINDER) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    converted = {
        name: _convert(name, fields[name], value, finders[name]) for name, value in values.items()
    }
    return Resolved(
        cls(**converted),
        {name: values[name].origin if name in values else "default" for name in fields},
    )


def check_fields(settings: object) -> None:
    """Check every field of a frozen dataclass against its type and the range in ``Annotated``.

    A text where a path is needed becomes a path, and a whole number where a float is needed a
    float. Meant for ``__post_init__``.

    Raises:
        ConfigError: a value has the wrong type or is out of its range.
    """
    for name, hint in field_types(type(settings)).items():
        value = getattr(settings, name)
        object.__setattr__(settings, name, _checked(name, value, hint))


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Make the error for a name that is not known, with the nearest one that is.

    Args:
        what: how the message begins.
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
    """Read in which section the option of each field is; a field in none has no option."""
    found: dict[str, Section] = {}
    for base in reversed(cls.__mro__):
        for section, names in vars(base).get(SECTIONS, {}).items():
            found |= dict.fromkeys(names, section)
    return found


def given_flags(flags: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Given]:
    """Take the flags that were given.

    Raises:
        ConfigError: a name is that of no field.
    """
    found = {}
    for name, raw in flags.items():
        if raw is None or raw == ():
            continue
        if name not in fields:
            raise unknown_name(f"unknown setting {name!r}", name, fields)
        found[name] = Given(raw, f"flag --{name.replace('_', '-')}", is_text=True)
    return found


def _convert(name: str, hint: Any, value: Given, finder: Finder | None) -> Any:
    raw, (kind, _) = value.raw, field_kind(hint)

    def find(given: str) -> Path:
        base = value.base or Path()
        if finder is None:
            return base / expand_user(given)
        try:
            return finder(given, base)
        except EdgeError as error:
            raise type(error)(f"{value.origin}: {name} is {given!r}: {error}") from error

    if value.is_text and typing.get_origin(kind) is dict:
        raw = _pairs(name, raw, value.origin, None if finder is None else find)
    if value.is_text and typing.get_origin(kind) is list:
        raw = [part.strip() for part in raw.split(",")]
    return _checked(
        name, raw, hint, origin=f"{value.origin}: ", strict=not value.is_text, find=find
    )


def _checked(
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
        origin: where the value came from, as an error's message begins.
        strict: false reads numbers from text.
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


def _pairs(name: str, raw: Any, origin: str, find: Callable[[str], Path] | None) -> Any:
    """Read ``a=b,c=d``, or ``("a=b", "c=d")`` of a repeated flag, as a mapping.

    With ``find`` a part that has no ``=``, or begins as a path does, is found, and has the name of
    its directory.
    """
    if isinstance(raw, Mapping):
        return raw
    result: dict[str, str | Path] = {}
    for part in raw.split(",") if isinstance(raw, str) else raw:
        key, equals, text = (piece.strip() for piece in part.partition("="))
        value: str | Path = text
        if find is not None and key and (not equals or key.startswith(_PATH_BEGINS)):
            value = find(part.strip())
            key = value.resolve().name
        elif not key or not equals or not text:
            raise ConfigError(f"{origin}: {name} needs NAME=VALUE, found {part!r}")
        if key in result:
            raise ConfigError(f"{origin}: {name} names {key!r} twice")
        result[key] = value
    return result
