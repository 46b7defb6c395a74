"""Paths that depend on the user: what ``~`` means, and where data, caches and state are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .errors import ConfigError


def expand_user(text: str) -> Path:
    """Make a path of a text, with the home directory in the place of ``~`` or ``~NAME``.

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
    """Find a directory of the user, as the XDG base directory specification has them.

    Args:
        variable: that names it, where it is set.
        default: below the home, where it is not.
        environ: where the variable and ``HOME`` are looked for.

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
