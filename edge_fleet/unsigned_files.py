"""Finds parts of a bundle that nobody vouches for: engines, and files in no list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge.bundle.engine_file import ENGINE_JSON, find_engines, read_engine_bytes
from edge.bundle.engine_records import ENGINE_SIGNATURE, who_vouches
from edge.bundle.manifest import ENGINES_DIR
from edge.errors import BundleError
from edge.files import list_directory
from edge_make.atomic_swap import own_entries
from edge_make.engine_layers import is_layers_file

_ENGINE_FILES = {ENGINE_JSON, ENGINE_SIGNATURE, "build.log", "timing.cache"}
_UNASKED = "nobody is asked who vouches for it: no keys are trusted here"


class Uncovered(NamedTuple):
    """Parts of a bundle that nobody vouches for, and who vouches for its other engines.

    Attributes:
        engines: for each vouched engine by name, who vouches for it.
        unvouched: for each of the other engines, why nobody does; they do not run.
        unlisted: files and directories, relative to the bundle, that no manifest lists and no build
            makes; nothing reads them.
    """

    engines: dict[str, str]
    unvouched: dict[str, str]
    unlisted: list[str]


def find_uncovered(bundle: Path, trusted_keys: Path | None) -> Uncovered:
    """Search a bundle whose manifest has been read, and whose files match it.

    Args:
        bundle: directory of the bundle.
        trusted_keys: file of public keys; None if none are trusted, and then engines are not
            checked.

    Raises:
        ConfigError: the file of trusted keys cannot be used.
    """
    engines: dict[str, str] = {}
    unvouched: dict[str, str] = {}
    for directory in find_engines(bundle):
        if trusted_keys is None:
            engines[directory.name] = _UNASKED
            continue
        try:
            data = read_engine_bytes(directory)
            engines[directory.name] = who_vouches(directory, data, trusted_keys)
        except BundleError as error:
            unvouched[directory.name] = str(error)
    return Uncovered(engines, unvouched, sorted(_strangers(bundle, {*engines, *unvouched})))


def _strangers(bundle: Path, engines: set[str]) -> Iterator[str]:
    root = bundle / ENGINES_DIR
    yield from ({path.name for path in bundle.iterdir()} - own_entries(bundle))
    for path in list_directory(root):
        if path.name not in engines and path.name != ".lock":
            yield f"{ENGINES_DIR}/{path.name}"
    for name in engines:
        for path in list_directory(root / name):
            ours = path.name in _ENGINE_FILES or path.name.endswith((".plan", ".weights"))
            if not ours and not is_layers_file(path.name):
                yield f"{ENGINES_DIR}/{name}/{path.name}"
