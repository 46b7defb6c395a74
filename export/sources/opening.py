"""Open the source of an export: a checkpoint directory, a hub repository or a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path

from edge.bundle.model_config import parse_config
from edge.errors import CheckpointError, ConfigError

from .checkpoint import Checkpoint
from .checkpoint_text import read_json, read_text
from .gguf_source import GgufCheckpoint
from .hf_directory import HfDirectory
from .hub import download
from .quantization_config import read_quantization

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    source: str, *, revision: str | None = None, cache_dir: Path | None = None
) -> Checkpoint:
    """Open a model by whatever names it.

    Args:
        source: an existing directory in Hugging Face's layout, an existing ``.gguf`` file, or a
            hub id ``owner/name``, in this order.
        revision: branch, tag or commit of a hub id; None is its default branch.
        cache_dir: where a hub id is downloaded to; None is the hub's own cache.

    Raises:
        CheckpointError: no such source, or one that cannot be exported.
        ConfigError: ``revision`` or ``cache_dir`` with a local source.
        DependencyError: a library of the extra ``export`` is missing.
    """
    path = Path(source)
    is_gguf = path.suffix.lower() == ".gguf" and path.is_file()
    if is_gguf or path.is_dir():
        if revision is not None or cache_dir is not None:
            option = "--revision" if revision is not None else "--cache-dir"
            raise ConfigError(f"{option} is for hub ids, but {source} is local; leave it out")
        return GgufCheckpoint(path) if is_gguf else HfDirectory(path)
    if path.is_file():
        raise CheckpointError(
            f"{source} is a file but no .gguf; give the checkpoint's directory instead"
        )
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"nothing to export at {source!r}: it is no directory, no .gguf file and no hub id "
            "(owner/name)"
        )
    directory, commit = download(source, revision, cache_dir, _check_text)
    return HfDirectory(directory, hub_id=source, revision=commit)


def _check_text(directory: Path) -> None:
    """Refuse what cannot be exported before gigabytes of it are downloaded."""
    config = read_json(directory / "config.json")
    spec = parse_config(config, str(directory / "config.json"))
    read_quantization(config, directory)
    read_text(directory, config, spec.vocab_size)
