"""Finds bundles by name: where this machine keeps them, and which one a name means."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge.errors import BundleError
from edge.files import exists, is_directory, is_file, list_directory
from edge.user_paths import expand_user, user_directory

from .manifest import MANIFEST_NAME, read_manifest

BUNDLES_VARIABLE = "EDGE_LLM_BUNDLES"
CATALOGUE = {
    "deepseek-r1:1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1:7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-r1:8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-r1:8b-0528": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "deepseek-r1:14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "deepseek-r1:32b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "qwen3:0.6b": "Qwen/Qwen3-0.6B",
    "qwen3:1.7b": "Qwen/Qwen3-1.7B",
    "qwen3:4b": "Qwen/Qwen3-4B",
    "qwen3:4b-instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3:4b-thinking": "Qwen/Qwen3-4B-Thinking-2507",
    "qwen3:8b": "Qwen/Qwen3-8B",
    "qwen3:14b": "Qwen/Qwen3-14B",
    "qwen3:32b": "Qwen/Qwen3-32B",
    "llama3.2:1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2:3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1:8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5:0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5:1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5:3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5:7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5:14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5:32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-coder:0.5b": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "qwen2.5-coder:1.5b": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "qwen2.5-coder:3b": "Qwen/Qwen2.5-Coder-3B-Instruct",
    "qwen2.5-coder:7b": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "qwen2.5-coder:14b": "Qwen/Qwen2.5-Coder-14B-Instruct",
    "qwen2.5-coder:32b": "Qwen/Qwen2.5-Coder-32B-Instruct",
    "smollm2:135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2:360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2:1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3:3b": "HuggingFaceTB/SmolLM3-3B",
    "granite3.3:2b": "ibm-granite/granite-3.3-2b-instruct",
    "granite3.3:8b": "ibm-granite/granite-3.3-8b-instruct",
}
"""Maps names that every verb prints to hub ids: ollama's names of models that can be exported.

`edge.bundle.model_names.hub_id` knows their other names.
"""
LATEST = {
    "qwen3": "8b",
    "llama3.2": "3b",
    "llama3.1": "8b",
    "qwen2.5": "7b",
    "qwen2.5-coder": "7b",
    "smollm2": "1.7b",
    "smollm3": "3b",
    "granite3.3": "8b",
}
"""Sizes that names of the `CATALOGUE` without one mean, as in ollama."""
_R1 = "deepseek-r1:"  # the models whose names may be any of their words, or a size alone
HUB_HOST = "hf.co/"
_ADDRESS = re.compile(
    r"(?:https?://)?(?:hf|(?:www\.)?huggingface)\.co/"
    r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::[\w.-]+)?)(?:/tree/main)?/?"
)
_SEPARATORS = re.compile(r"[-_:/ ]+")
ALIKE = 0.85  # least similarity of a name with a typo to the right one
_SIZE = re.compile(r"(?<![0-9a-z.])[0-9.]+[bm](?![0-9a-z])")
_QUANTIZED = re.compile(r"([-_: ]((int|fp|bf|w)[0-9]\w*|source))+$", re.IGNORECASE)


def roots() -> list[Path]:
    """Return the directories that hold bundles, in the order of search; they need not exist.

    They are those of ``EDGE_LLM_BUNDLES`` (separated as in ``PATH``), if it is set. Else they are
    ``bundles`` in the working directory and ``edge-llm/bundles`` among the user's data
    (``XDG_DATA_HOME``, XDG Base Directory Specification), which a user without a home does not
    have.
    """
    if given := os.environ.get(BUNDLES_VARIABLE):
        return [Path(entry) for entry in given.split(os.pathsep) if entry]
    data = user_directory("XDG_DATA_HOME", ".local/share")
    return [Path("bundles")] + ([] if data is None else [data / "edge-llm" / "bundles"])


def bundle_directories() -> Iterator[Path]:
    """Yield all bundles below the `roots`; of two with one name, the one in the first root."""
    seen = set()
    for root in roots():
        for directory in list_directory(root):
            hidden = directory.name.startswith(".")  # an unfinished export
            if hidden or directory.name in seen:
                continue
            if is_file(directory / MANIFEST_NAME):
                seen.add(directory.name)
                yield directory


def find_bundle(name: str) -> Path:
    """Find a bundle by its directory, by its name, or by some words of its name.

    A directory is used as it is. Else the name is looked for below the `roots`. The whole name
    comes first, then bundles whose names have all of its words, such as ``1.5b`` or
    ``qwen-1.5b:int8``. Of several, the one that ends with the last word wins, such as ``int8`` and
    not ``int8-w8a8``. A name of the `CATALOGUE` or a hub id there, alone or followed by a hyphen
    and a quantization, stands for its model, as a `hub_address` does.

    Raises:
        BundleError: no bundle, or more than one, has that name, or it is the name of a checkpoint
            or another file.
    """
    path = Path(name)
    if name and is_checkpoint(path):
        raise BundleError(_no_bundle(path))
    if name and is_directory(path):
        return path
    known = list(bundle_directories())
    for directory in known:
        if directory.name == name:
            return directory
    found = [directory for directory in known if _means(name, directory.name)]
    if len(found) > 1:
        last = _SEPARATORS.split(name.lower())[-1]
        found = [each for each in found if each.name.lower().endswith(f"-{last}")] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise BundleError(
            f"{name!r} fits {len(found)} bundles: {', '.join(map(str, found))}; give more of the "
            "name"
        )
    if is_file(path):
        raise BundleError(_no_bundle(path))
    raise BundleError(f"{_absence(name, known)}; {remedy(name, known)}")


def find_setting(text: str, base: Path) -> Path:
    """Find the bundle that a setting names, as `find_bundle` does.

    A text with a ``/`` is a path, whether or not it exists yet: opening it will tell. A hub id of
    the `CATALOGUE` is not a path.

    Args:
        text: the setting's text as it was written.
        base: directory that relative paths are relative to.

    Returns:
        The directory; absolute if it was found by its name.

    Raises:
        BundleError: no bundle, or more than one, has that name, or it is the name of a checkpoint
            or another file.
        ConfigError: it begins with the home of an unknown user.
    """
    path = base / expand_user(text)
    if is_checkpoint(path):
        raise BundleError(_no_bundle(path))
    if is_directory(path):
        return path
    if "/" in text and not named_models(text) and hub_address(text) is None:
        if is_file(path):
            raise BundleError(_no_bundle(path))
        return path
    return find_bundle(text).absolute()


def hub_address(text: str) -> str | None:
    """Return an address of the Hugging Face hub as ``hf.co/owner/name[:TAG]``; None if it is none.

    ``TAG`` is a quantization or the name of a GGUF file in that repository.
    """
    found = _ADDRESS.fullmatch(text)
    return None if found is None else f"{HUB_HOST}{found[1]}"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint, which `export` reads: a GGUF file, or a model's directory."""
    if path.suffix.lower() == ".gguf":
        return is_file(path)
    return is_file(path / "config.json") and not is_file(path / MANIFEST_NAME)


def checkpoint_bundle(path: Path) -> Path:
    """Return where the bundle of a local checkpoint belongs: beside it, never around it."""
    path = path.resolve() if path.name in ("", "..") else path
    name = (path.stem if path.suffix.lower() == ".gguf" else path.name).lower()
    target = roots()[0] / name
    around = path.resolve().is_relative_to(target.resolve())
    return target.with_name(f"{name}-int4") if around else target


def size_fits(wanted: str, right: str) -> bool:
    """Whether two names, in lower case, may mean one model: a 14b is no typo of a 1.5b."""
    return set(_SIZE.findall(wanted)) <= set(_SIZE.findall(right))


def catalogue_line() -> str:
    """Write the names of the `CATALOGUE` in one line, each family once."""
    sizes: dict[str, list[str]] = {}
    for short in CATALOGUE:
        family, _, size = short.partition(":")
        sizes.setdefault(family, []).append(f":{size}")
    return "; ".join(f"{family}{', '.join(each)}" for family, each in sizes.items())


def named_models(name: str) -> list[str]:
    """List the short names of the `CATALOGUE` whose models a name may mean."""
    name = (hub_address(name) or name).removeprefix(HUB_HOST)
    wanted, words = _with_size(name.lower()), _words(name)
    for short, source in CATALOGUE.items():
        if wanted in (short, source.lower(), source.lower().rpartition("/")[2]):
            return [short]
    if "/" in name or not ("r1" in words or _SIZE.fullmatch(wanted)):
        return []
    return [
        short
        for short, source in CATALOGUE.items()
        if short.startswith(_R1) and words <= _words(f"{short}-{source.rpartition('/')[2]}")
    ]


def _no_bundle(path: Path) -> str:
    if not is_checkpoint(path):
        return f"{path} is a file; a bundle is a directory"
    target = checkpoint_bundle(path)
    named = target if exists(Path(target.name)) else target.name  # a local path would win
    run = f"edge-llm run {shlex.quote(str(named))}"
    if not is_file(target / MANIFEST_NAME):
        output = shlex.quote(str(target))
        export = f"edge-llm export {shlex.quote(str(path))} -o {output} --fast"
        return f"{path} is a checkpoint: {export}, then {run}"
    source = read_manifest(target).source.location
    if Path(source).name in (path.name, path.resolve().name):
        return f"{path} is a checkpoint, and the bundle of one with that name is there: {run}"
    return f"{path} is a checkpoint, and {target} was made of {source}; export it with another -o"


def _means(name: str, directory: str) -> bool:
    address = hub_address(name)
    name = (address or name).removeprefix(HUB_HOST)
    wanted, model = _with_size(name.lower()), _model_of(directory)
    for short in sorted(CATALOGUE, key=len, reverse=True):
        for known in (short, CATALOGUE[short].lower()):
            if wanted == known or wanted.startswith(f"{known}-"):
                named = CATALOGUE[short].rpartition("/")[2].lower()
                rest = _words(wanted[len(known) :])
                if named == model and rest <= _words(directory[len(model) :]):
                    return True
                if wanted == name.lower():
                    return False
    if address is not None:
        begin = wanted.rpartition("/")[2].replace(":", "-")
        rest_of_name = directory.lower().removeprefix(begin)
        return directory.lower().startswith(begin) and bool(
            not rest_of_name or _QUANTIZED.fullmatch(rest_of_name)
        )
    words = _words(name)
    return bool(words) and words <= _words(directory)


def _with_size(name: str) -> str:
    """Add to a name in lower case the size that `LATEST` has for it."""
    family, _, tag = name.partition(":")
    is_bare = family in LATEST and tag in ("", "latest")
    return f"{family}:{LATEST[family]}" if is_bare else name


def _model_of(directory: str) -> str:
    """Return the model of the `CATALOGUE` that a bundle's name begins with; "" if with none."""
    models = (source.rpartition("/")[2].lower() for source in CATALOGUE.values())
    return max(filter(directory.lower().startswith, models), key=len, default="")


def _words(text: str) -> set[str]:
    return {word for word in _SEPARATORS.split(text.lower()) if word}


def _absence(name: str, known: list[Path]) -> str:
    where = " or ".join(map(str, roots()))
    if not known:
        return f"no directory {name} and no bundle in {where}"
    names = ", ".join(directory.name for directory in known)
    return f"no directory {name} and no bundle of that name in {where}, which has {names}"


def remedy(name: str, known: Sequence[Path] = ()) -> str:
    """Say how to get a bundle of this name, or which of the ``known`` is meant."""
    if (address := hub_address(name)) is not None:
        return f"get it with: edge-llm pull {address}"
    wanted, model = name.lower(), _QUANTIZED.sub("", name)
    named, words = named_models(model), _words(model)
    for directory in known:
        right = directory.name.lower()
        alike = difflib.get_close_matches(wanted, (right, *_words(right)), 1, ALIKE)
        if alike and not named and size_fits(wanted, right):
            return f"did you mean {directory.name}?"
    near = named or [
        short for short in CATALOGUE if words and words <= _words(f"{short}-{CATALOGUE[short]}")
    ]
    if near:
        return f"get it with: edge-llm pull {' or '.join(near)}"
    return "edge-llm pull deepseek-r1:1.5b gets one, edge-llm export makes one of any checkpoint"
