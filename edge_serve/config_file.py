"""Reads settings from a TOML file, the environment and flags: the later overrides the earlier.

The settings themselves are a frozen dataclass; its fields are the keys of the file, the environment
variables ``EDGE_LLM_SERVE_<KEY>`` and, of those with a section, the flags ``--<key>``. Nothing is
accepted and ignored: an unknown key, or an unknown variable with that prefix, is refused with the
nearest known one. The origin of each value is kept, for ``edge-llm config show --origin``.

A relative path in the file is relative to the file; elsewhere it is relative to the working
directory. An empty variable counts as not set, since systemd units write it that way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge.errors import ConfigError, DependencyError, install_command
from edge.files import MALFORMED
from edge.layered_settings import Given, Resolved, Settings, given_flags, resolve
from edge.settings_fields import field_types, unknown_name

ENV_PREFIX = "EDGE_LLM_SERVE_"
DEFAULT_FILE = Path("/etc/edge-llm/config.toml")
MAX_FILE_BYTES = 1 << 20


def load_settings(
    cls: type[Settings],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Resolved[Settings]:
    """Merge the layers of settings.

    Args:
        cls: a frozen dataclass with a default for every field.
        file: a TOML file, or None.
        environ: e.g. ``os.environ``; only names with `ENV_PREFIX` count.
        flags: flags by field name; None and an empty tuple mean that a flag was not given.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of its range, or a file
            cannot be read.
        DependencyError: there is a file, on Python 3.10 without tomli.
    """
    fields = field_types(cls)
    values: dict[str, Given] = {}
    if file is not None:
        values |= _from_file(file, fields)
    values |= _from_environment(environ or {}, fields)
    values |= given_flags(flags or {}, fields)
    return resolve(cls, values)


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


def _from_file(path: Path, fields: Mapping[str, Any]) -> dict[str, Given]:
    parsed = read_toml(path)
    for key in parsed:
        if key not in fields:
            raise unknown_name(f"{path}: unknown key {key!r}", key, fields)
    return {key: Given(raw, f"file {path}", path.parent) for key, raw in parsed.items()}


def _from_environment(environ: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Given]:
    names = {f"{ENV_PREFIX}{name.upper()}": name for name in fields}
    found = {}
    for variable, raw in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        if variable not in names:
            raise unknown_name(f"unknown environment variable {variable}", variable, names)
        if raw:
            found[names[variable]] = Given(raw, f"environment {variable}", is_text=True)
    return found
