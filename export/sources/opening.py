"""Opens the source of an export: a checkpoint directory, a hub repository or a GGUF file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from edge.bundle.library import HUB_HOST, hub_address
from edge.bundle.model_names import hub_id, nearest_model
from edge.errors import CheckpointError, ConfigError
from edge.model.spec import ModelSpec, Task
from edge_make.model_config import parse_config
from edge_make.other_models import named_otherwise
from edge_make.progress import Progress, silent
from edge_make.published import REVISIONS

from . import modelscope
from .checkpoint import Checkpoint
from .checkpoint_text import read_json, read_text
from .download import Download, Preview
from .gguf_source import GgufCheckpoint
from .hf_directory import HfDirectory
from .hub import TEXT_FILES, download, download_gguf
from .picture_encoder import read_vision
from .pooling import Judge, find_task
from .quantization_config import QuantizationConfig, read_quantization

Hub = Literal["huggingface", "modelscope"]
HUB_VARIABLE = "EDGE_LLM_HUB"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    hub: Hub | None = None,
    progress: Progress = silent,
    task: Task | None = None,
    before_download: Callable[[Preview], object] | None = None,
) -> Checkpoint:
    """Open a model by its path, name or hub id.

    Args:
        source: what is to be opened, by the first of these that fits: an existing directory in
            Hugging Face's layout, an existing ``.gguf`` file, a name of
            `edge.bundle.model_names.hub_id`, a `hub_address`, a hub id ``owner/name``.
        revision: branch, tag or commit of a hub id; None is its default branch, or for a name on
            the Hugging Face hub the commit that `REVISIONS` may have.
        cache_dir: directory to download a hub id to; None is the hub's own cache.
        hub: hub that has a hub id; None is ``EDGE_LLM_HUB``, else the Hugging Face hub.
        progress: told of a download from ModelScope; huggingface-hub shows its own.
        task: use of the model; None is ``embed`` for a directory of sentence-transformers, and
            ``generate`` for all others.
        before_download: called for a hub id, before its weights are fetched; an exception that it
            raises ends the download.

    Raises:
        CheckpointError: no such source, or one that cannot be exported.
        ConfigError: ``revision``, ``cache_dir`` or ``hub`` with a local source, no such hub, or a
            name that could be more than one model.
        DependencyError: a library of the extra ``export`` is missing.
    """
    path = Path(source)
    is_gguf = path.suffix.lower() == ".gguf" and path.is_file()
    if is_gguf or path.is_dir():
        for option, value in (("--revision", revision), ("--cache-dir", cache_dir), ("--hub", hub)):
            if value is not None:
                raise ConfigError(f"{option} is for hub ids, but {source} is local; leave it out")
        if not is_gguf:
            return _open_directory(path, task)
        return _open_gguf(path, task)
    if path.is_file():
        raise CheckpointError(
            f"{source} is a file but no .gguf; give the checkpoint's directory instead"
        )
    asked, tag = source, ""
    if (address := hub_address(source)) is not None:
        if hub == "modelscope":
            raise ConfigError(f"{source} is on the Hugging Face hub; leave out --hub modelscope")
        hub = "huggingface"
        source, _, tag = address.removeprefix(HUB_HOST).partition(":")
        if tag:
            return _open_gguf(download_gguf(source, revision, cache_dir, tag), task)
    if (known := hub_id(source)) is not None and "/" not in source:
        if chosen_hub(hub) == "huggingface":
            revision = revision or REVISIONS.get(known)
        source = known
    if not _HUB_ID.fullmatch(source):
        near = named_otherwise(source) or nearest_model(source)
        hint = "" if "/" in source else f", nor the name of a model; {near}"
        raise CheckpointError(
            f"nothing to export at {source!r}: it is no directory, no .gguf file and no hub id "
            f"(owner/name){hint}"
        )

    def check(directory: Path, weights: Download) -> None:
        spec, quantization = _check_text(directory, task)
        if before_download is not None:
            before_download(Preview(asked, spec, quantization, weights))

    if chosen_hub(hub) == "modelscope":
        directory, commit = modelscope.download(
            source, revision, cache_dir, check, TEXT_FILES, progress
        )
        return _open_directory(directory, task, source, commit, hub="modelscope")
    directory, commit = download(source, revision, cache_dir, check)
    return _open_directory(directory, task, source, commit)


def _open_gguf(path: Path, task: Task | None) -> Checkpoint:
    if task == "embed":
        raise CheckpointError(
            f"{path} is a GGUF file, which does not say how its model embeds; export the directory "
            "that it was made of (config.json, modules.json, safetensors)"
        )
    gguf = GgufCheckpoint(path)
    return Judge(gguf) if task == "rerank" else gguf


def chosen_hub(hub: str | None) -> str:
    """Return the hub of an option, else that of ``EDGE_LLM_HUB``, else ``huggingface``.

    Raises:
        ConfigError: there is no such hub.
    """
    chosen = hub or os.environ.get(HUB_VARIABLE) or "huggingface"
    if chosen not in get_args(Hub):
        where = HUB_VARIABLE if hub is None else "hub"
        raise ConfigError(f"{where} is {chosen!r}; use {', '.join(get_args(Hub))}")
    return chosen


def _open_directory(
    directory: Path,
    task: Task | None,
    hub_id: str | None = None,
    revision: str | None = None,
    hub: str | None = None,
) -> Checkpoint:
    task = task or find_task(directory)
    own: Task = "generate" if task == "rerank" else task
    opened = HfDirectory(directory, hub_id=hub_id, revision=revision, hub=hub, task=own)
    return Judge(opened) if task == "rerank" else opened


def _check_text(directory: Path, task: Task | None) -> tuple[ModelSpec, QuantizationConfig | None]:
    """Refuse a checkpoint that cannot be exported before gigabytes of it are downloaded."""
    config = read_json(directory / "config.json")
    task = task or find_task(directory)
    spec = parse_config(config, str(directory / "config.json"), task)
    quantization = read_quantization(config, directory)
    read_text(directory, config, spec.vocab_size)
    read_vision(directory, config, spec.hidden_size)
    return spec, quantization
