"""Makes settings from flags, files and the environment, and records where each value came from.

A table (``model``) is written ``name=value,name=value`` in one text, a list ``value,value``. A
field whose metadata has a `Finder` takes names as well as paths; in a table of them a value without
a name gets the name of the directory that was found. Reading files and the environment is in
`edge_serve.config_file`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import ConfigError, EdgeError
from .settings_fields import FINDER, Finder, checked, field_kind, field_types, unknown_name
from .user_paths import expand_user

_PATH_BEGINS = ("/", "./", "../", "~")  # a name may contain a slash, as in owner/model
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
    """A value as it was written, and its origin."""

    raw: Any
    origin: str
    base: Path | None = None  # directory that a relative path is relative to
    is_text: bool = False  # whether numbers arrive as text


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
    """Convert every value to its field's type, and record where it came from.

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


def given_flags(flags: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Given]:
    """Return the flags that were given.

    Raises:
        ConfigError: no field has this name.
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
    return checked(name, raw, hint, origin=f"{value.origin}: ", strict=not value.is_text, find=find)


def _pairs(name: str, raw: Any, origin: str, find: Callable[[str], Path] | None) -> Any:
    """Read ``a=b,c=d``, or ``("a=b", "c=d")`` of a repeated flag, as a mapping.

    If ``find`` is given, a part that has no ``=``, or begins as a path does, is found by it and
    gets the name of its directory.
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
