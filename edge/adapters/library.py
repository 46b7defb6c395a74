"""Keeps a bundle's adapters beside it, in ``BUNDLE.adapters/NAME/``.

A bundle is signed and replaced as a whole, so adapters, which come and go, are not inside it. Each
directory is one adapter as peft saved it, and the directory's name is the adapter's. A roll-out
keeps versions of an adapter as ``NAME@VERSION`` and makes ``NAME`` a link to one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from edge.errors import ConfigError, RequestError, ResourceError
from edge.files import is_directory, is_file, list_directory

from .peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .peft_file import adapter_files
from .trust import SIGNATURE_NAME

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


def add_adapter(bundle: Path, source: Path, name: str) -> Path:
    """Copy an adapter that has been read and fits into the bundle's library.

    Raises:
        ConfigError: the name is invalid or taken.
        ResourceError: the adapter cannot be written.
    """
    target = library(bundle) / check_name(name)
    if os.path.lexists(target):
        raise ConfigError(
            f"the bundle has an adapter {name!r} already; remove it with: edge-llm adapter rm "
            f"{name} {bundle}"
        )
    files = adapter_files(source)
    staging = target.with_name(f".{name}.adding")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for file, kept in zip(files, (ADAPTER_CONFIG, ADAPTER_WEIGHTS), strict=True):
            shutil.copyfile(file, staging / kept)
        if is_file(signature := files[1].with_name(SIGNATURE_NAME)):
            shutil.copyfile(signature, staging / SIGNATURE_NAME)
        staging.rename(target)
    except OSError as error:
        raise ResourceError(
            f"cannot write {target}: {error.strerror}; free disk space, or add it as a user who may"
        ) from error
    return target


def remove_adapter(bundle: Path, name: str) -> None:
    """Remove an adapter; answers that use it continue.

    Raises:
        RequestError: there is no adapter of this name.
        ResourceError: it cannot be removed.
    """
    path = stored_adapters(bundle).get(name)
    if path is None:
        raise unknown_adapter(name, stored_adapters(bundle))
    try:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
        for version in path.parent.glob(f"{name}@*"):  # of roll-outs
            shutil.rmtree(version)
    except OSError as error:
        raise ResourceError(f"cannot remove {path}: {error.strerror}; see who owns it") from error


def unknown_adapter(name: str, known: Collection[str]) -> RequestError:
    """Return the error for a name that no adapter has."""
    names = ", ".join(known) or "none"
    return RequestError(
        f"there is no adapter {name!r:.80}; there are: {names} (edge-llm adapter add PATH BUNDLE)"
    )
