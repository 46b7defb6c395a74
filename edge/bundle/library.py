"""Bundles by name: where this machine keeps them, and which one a name means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from edge.errors import BundleError
from edge.files import is_directory, is_file, list_directory
from edge.user_paths import expand_user, user_directory

from .manifest import MANIFEST_NAME

BUNDLES_VARIABLE = "EDGE_LLM_BUNDLES"
CATALOGUE = {
    "deepseek-r1:1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1:7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-r1:8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-r1:8b-0528": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
}
"""Hub ids of the models that this project is for, by a name that is quicker to type."""
REVISIONS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "916b56a44061fd5cd7d6a8fb632557ed4f724f60",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "6a6f4aa4197940add57724a7707d069478df56b1",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "6e8885a6ff5c1dc5201574c8fd700323f23c25fa",
}
"""Commit of the Hugging Face hub that a name of the `CATALOGUE` means.

Each is the one that public projects which pin these models name, independently of each other
(searched in November 2026); the hub was not asked. A hub that does not have it refuses it.
"""
_SEPARATORS = re.compile(r"[-_:/ ]+")


def roots() -> list[Path]:
    """Directories that hold bundles, the first to be searched first; they need not exist.

    ``EDGE_LLM_BUNDLES`` (several are separated as in ``PATH``), else ``bundles`` in the working
    directory and ``edge-llm/bundles`` among the user's data (``XDG_DATA_HOME``, XDG Base Directory
    Specification), which a user without a home does not have.
    """
    if given := os.environ.get(BUNDLES_VARIABLE):
        return [Path(entry) for entry in given.split(os.pathsep) if entry]
    data = user_directory("XDG_DATA_HOME", ".local/share")
    return [Path("bundles")] + ([] if data is None else [data / "edge-llm" / "bundles"])


def bundle_directories() -> Iterator[Path]:
    """All bundles below the `roots`. Of two with one name the first root's is found."""
    seen = set()
    for root in roots():
        for directory in list_directory(root):
            hidden = directory.name.startswith(".")  # an export that is under way
            if hidden or directory.name in seen:
                continue
            if is_file(directory / MANIFEST_NAME):
                seen.add(directory.name)
                yield directory


def bundle_name(hub_id: str, quantization: str) -> str:
    """Name the bundle of a model, e.g. ``deepseek-r1-distill-qwen-1.5b-int4``."""
    return f"{hub_id.rsplit('/', 1)[-1].lower()}-{quantization}"


def find_bundle(name: str) -> Path:
    """Find a bundle by its directory, by its name, or by some words of its name.

    A directory is taken as it is. Else the name is looked for below the `roots`: the whole name
    first, then bundles whose names have all of its words, such as ``1.5b`` or ``qwen-1.5b:int8``.
    A name of the `CATALOGUE`, alone or with a quantization behind a hyphen, stands for its model.

    Raises:
        BundleError: no bundle, or more than one, has that name.
    """
    if name and is_directory(Path(name)):
        return Path(name)
    known = list(bundle_directories())
    for directory in known:
        if directory.name == name:
            return directory
    found = [directory for directory in known if _means(name, directory.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise BundleError(
            f"{name!r} fits {len(found)} bundles: {', '.join(map(str, found))}; give more of the "
            "name"
        )
    raise BundleError(f"{_absence(name, known)}; {_remedy(name)}")


def find_setting(text: str, base: Path) -> Path:
    """Find the bundle that a setting names, as `find_bundle` does.

    A text with a ``/`` is a path, whether or not there is anything yet: who opens it will say.

    Args:
        text: as it was written.
        base: what a relative path is relative to.

    Returns:
        The directory, absolute where it was found by its name.

    Raises:
        BundleError: no bundle, or more than one, has that name.
        ConfigError: it begins with a home directory that is not known.
    """
    path = base / expand_user(text)
    if "/" in text or is_directory(path):
        return path
    return find_bundle(text).absolute()


def hub_id(name: str) -> str | None:
    """Return the hub id of a name of the `CATALOGUE`, whatever its case; None of any other."""
    return CATALOGUE.get(name.lower())


def _means(name: str, directory: str) -> bool:
    wanted = name.lower()
    for short in sorted(CATALOGUE, key=len, reverse=True):
        if wanted == short or wanted.startswith(f"{short}-"):
            model = CATALOGUE[short].rsplit("/", 1)[-1].lower()
            rest = _words(wanted[len(short) :])
            return directory.lower().startswith(model) and rest <= _words(directory[len(model) :])
    words = _words(wanted)
    return bool(words) and words <= _words(directory)


def _words(text: str) -> set[str]:
    return {word for word in _SEPARATORS.split(text.lower()) if word}


def _absence(name: str, known: list[Path]) -> str:
    where = " or ".join(map(str, roots()))
    if not known:
        return f"no directory {name} and no bundle in {where}"
    names = ", ".join(directory.name for directory in known)
    return f"no directory {name} and no bundle of that name in {where}, which has {names}"


def _remedy(name: str) -> str:
    for short in CATALOGUE:
        if _words(name) and _words(name) <= _words(f"{short}-{CATALOGUE[short]}"):
            return f"get it with: edge-llm pull {short}"
    return "edge-llm pull deepseek-r1:1.5b gets one, edge-llm export makes one of any checkpoint"
