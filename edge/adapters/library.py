"""Keeps a bundle's adapters beside it, in ``BUNDLE.adapters/NAME/``.

A bundle is signed and replaced as a whole, so adapters, which come and go, are not inside it. Each
directory is one adapter as peft saved it, and the directory's name is the adapter's. A roll-out
keeps versions of an adapter as ``NAME@VERSION`` and makes ``NAME`` a link to one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from edge.errors import ConfigError, RequestError
from edge.files import is_directory, list_directory

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


def check_name(name: str) -> str:
    """Return ``name`` if an adapter may have it.

    Raises:
        ConfigError: the name has other characters, or too many.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.80} cannot be an adapter's name; use 1 to 64 letters, digits, '-', '_' and "
            "'.', the first a letter or a digit"
        )
    return name


def library(bundle: Path) -> Path:
    """Return the directory of a bundle's adapters; it need not exist."""
    path = bundle.absolute()
    return path.with_name(f"{path.name}.adapters")


def stored_adapters(bundle: Path) -> dict[str, Path]:
    """List a bundle's adapters by name."""
    found = list_directory(library(bundle))
    return {each.name: each for each in found if _NAME.fullmatch(each.name) and is_directory(each)}


def unknown_adapter(name: str, known: Collection[str]) -> RequestError:
    """Return the error for a name that no adapter has."""
    names = ", ".join(known) or "none"
    return RequestError(
        f"there is no adapter {name!r:.80}; there are: {names} (edge-llm adapter add PATH BUNDLE)"
    )
