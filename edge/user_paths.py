"""Finds paths that depend on the user: the meaning of ``~``, and data, cache and state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .errors import ConfigError


def expand_user(text: str) -> Path:
    """Make a path of a text, with the home directory in place of ``~`` or ``~NAME``.

    Raises:
        ConfigError: there is no such home directory.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{text}: this system knows no such home directory; write the path without ~"
        ) from error


def user_directory(
    variable: str, default: str, environ: Mapping[str, str] = os.environ
) -> Path | None:
    """Find a directory of the user, as the XDG base directory specification defines it.

    Args:
        variable: environment variable that names the directory.
        default: path below the home, if the variable is not set.
        environ: environment with the variable and ``HOME``.

    Returns:
        The directory, which need not exist; None for a user without a home, as in a container whose
        ``HOME`` is not set and whose user the system does not know.
    """
    if given := environ.get(variable):
        return Path(given)
    try:
        return Path(environ.get("HOME") or Path.home()) / default
    except RuntimeError:
        return None
