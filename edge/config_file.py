"""Reads settings from a TOML file, the environment and flags: the later overrides the earlier.

The settings themselves are a frozen dataclass; its fields are the keys of the file, the environment
variables ``EDGE_LLM_SERVE_<KEY>`` and the flags ``--<key>``. Nothing is accepted and ignored: an
unknown key, or an unknown variable with that prefix, is refused with the nearest known one. The
origin of each value is kept, for ``edge-llm config show --origin``.

A table (``model``) is replaced as a whole by a stronger layer. In a variable it is written
``name=value,name=value``. A relative path in the file is relative to the file, elsewhere to the
working directory; a field whose metadata has a `Finder` takes names beside paths, and in a table of
them a value alone has the name of the directory that was found. An empty variable counts as not
set, since systemd units write it that way.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from .errors import ConfigError, DependencyError, EdgeError, install_command
from .files import MALFORMED
from .user_paths import expand_user

ENV_PREFIX = "EDGE_LLM_SERVE_"
DEFAULT_FILE = Path("/etc/edge-llm/config.toml")
MAX_FILE_BYTES = 1 << 20
FINDER = "finder"
"""Key of a `Finder` in a field's metadata."""
_PATH_BEGINS = ("/", "./", "../", "~")  # a name may have a slash in it, as owner/model
Finder = Callable[[str, Path], Path]
"""Finds what a text names; the second argument is what a relative path is relative to."""

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
class _Value:
    """A value as it was written, and where."""

    raw: Any
    origin: str
    base: Path | None = None  # what a relative path is relative to
    is_text: bool = False  # numbers arrive as text


def load_settings(
    cls: type[Settings],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Resolved[Settings]:
    """Put the layers of settings together.

    Args:
        cls: a frozen dataclass with a default for every field.
        file: a TOML file, or None.
        environ: e.g. ``os.environ``; only names with `ENV_PREFIX` are looked at.
        flags: flags by field name; None and an empty tuple mean that a flag was not given.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of its range, or a file
            cannot be read.
        DependencyError: there is a file, on Python 3.10 without tomli.
    """
    fields = _hints(cls)
    values: dict[str, _Value] = {}
    if file is not None:
        values |= _from_file(file, fields)
    values |= _from_environment(environ or {}, fields)
    values |= _from_flags(flags or {}, fields)
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
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        object.__setattr__(settings, name, _checked(name, value, hint))


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Make the error for a name that is not known, with the nearest one that is.

    Args:
        what: how the message begins.
        name: the name that was given.
        known: the names that are known.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return ConfigError(f"{what}; the nearest known one is {near[0]!r}")


def field_kind(hint: Any) -> tuple[Any, bool]:
    """Split a field's type into the type without None, and whether None is allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) == 1:
            return options[0], True
    return hint, False


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of at most 1 MiB.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not TOML.
        DependencyError: this is Python 3.10 without tomli.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise DependencyError(
                f"a configuration file needs tomli on Python 3.10; run: {install_command('serve')}"
            ) from error
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes; is it a configuration?")
    try:
        parsed: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except MALFORMED as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return parsed


def _hints(cls: Any) -> dict[str, Any]:
    """Read the type of every field, with its ``Annotated`` metadata."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _from_file(path: Path, fields: Mapping[str, Any]) -> dict[str, _Value]:
    parsed = read_toml(path)
    for key in parsed:
        if key not in fields:
            raise unknown_name(f"{path}: unknown key {key!r}", key, fields)
    return {key: _Value(raw, f"file {path}", path.parent) for key, raw in parsed.items()}


def _from_environment(environ: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, _Value]:
    names = {f"{ENV_PREFIX}{name.upper()}": name for name in fields}
    found = {}
    for variable, raw in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        if variable not in names:
            raise unknown_name(f"unknown environment variable {variable}", variable, names)
        if raw:
            found[names[variable]] = _Value(raw, f"environment {variable}", is_text=True)
    return found


def _from_flags(flags: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, _Value]:
    found = {}
    for name, raw in flags.items():
        if raw is None or raw == ():
            continue
        if name not in fields:
            raise unknown_name(f"unknown setting {name!r}", name, fields)
        found[name] = _Value(raw, f"flag --{name.replace('_', '-')}", is_text=True)
    return found


def _convert(name: str, hint: Any, value: _Value, finder: Finder | None) -> Any:
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
