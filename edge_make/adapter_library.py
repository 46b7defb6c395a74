"""Adds adapters to a bundle's library, and removes them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edge.adapters.library import check_name, library, stored_adapters, unknown_adapter
from edge.adapters.peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from edge.adapters.peft_file import adapter_files
from edge.adapters.trust import SIGNATURE_NAME
from edge.errors import ConfigError, ResourceError
from edge.files import is_file


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
