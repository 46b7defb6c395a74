"""Downloads a checkpoint from the Hugging Face hub, or finds it in the local cache."""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from urllib.parse import urlsplit

from edge.bundle.library import HUB_HOST
from edge.errors import CheckpointError, DependencyError, install_command
from edge_make.families import FAMILIES
from edge_make.other_models import instead

from .download import Download

TEXT_FILES = [
    "config.json",
    "hf_quant_config.json",  # of ModelOpt
    "quantize_config.json",  # of AutoGPTQ
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "README.md",
    # Files of sentence-transformers.
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    # Files of models that read pictures.
    "preprocessor_config.json",
    "processor_config.json",
]
# No directory part: original/consolidated.*.safetensors would be the same weights twice.
_WEIGHT_FILES = ["model.safetensors", "model-*-of-*.safetensors", "gptq_model-*.safetensors"]


_CONNECT_S = 10
_LABEL = re.compile(r"(?:^|[-._])((?:UD-)?I?[QT]Q?\d\w*|BF16|F16|F32|MXFP4\w*)$", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_NO_MODEL = ("mmproj", "imatrix")  # GGUF files beside a model: a picture encoder, statistics


def download(
    repo_id: str,
    revision: str | None,
    cache_dir: Path | None,
    check: Callable[[Path, Download], object],
) -> tuple[Path, str]:
    """Fetch one revision of a repository: first the small files, then the weights.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None is the default branch.
        cache_dir: the hub's cache; None is the one of ``HF_HOME``.
        check: called with the directory and the weights still to come, before any of them is
            fetched; an exception that it raises ends the download.

    Returns:
        The snapshot's directory and its commit.

    Raises:
        CheckpointError: not found, no access, no network, or no such revision.
        DependencyError: huggingface-hub is not installed.
    """
    directory = _snapshot(repo_id, revision, cache_dir, TEXT_FILES)
    # The cache names each snapshot after its commit (huggingface_hub, "Understand caching"), so
    # both steps and the manifest use the same one, even if the branch moves in between.
    commit = directory.name
    missing = _missing_bytes(repo_id, commit, directory)
    alone = missing == 0 and not _has_weights(directory)
    if alone and (models := _gguf_models(_file_names(repo_id, directory))):
        tags = ", ".join(f":{label}" for label in sorted(set(models.values())))
        raise CheckpointError(
            f"{repo_id} has its weights in GGUF files alone; say which one: "
            f"{HUB_HOST}{repo_id} with one of {tags}"
        )
    check(directory, Download(missing, directory.parents[2]))
    return _snapshot(repo_id, commit, cache_dir, TEXT_FILES + _WEIGHT_FILES), commit


def download_gguf(repo_id: str, revision: str | None, cache_dir: Path | None, tag: str) -> Path:
    """Fetch one GGUF file of one revision of a repository.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None is the default branch.
        cache_dir: the hub's cache; None is the one of ``HF_HOME``.
        tag: quantization at the end of the file's name, or that name.

    Raises:
        CheckpointError: `download` would raise it, or the tag fits no file or several.
        DependencyError: huggingface-hub is not installed.
    """
    directory = _snapshot(repo_id, revision, cache_dir, TEXT_FILES)
    name = choose_gguf(_file_names(repo_id, directory), tag, repo_id)
    _refuse_architecture(repo_id, directory.name)
    return _snapshot(repo_id, directory.name, cache_dir, [escape(name)]) / name


def _refuse_architecture(repo_id: str, commit: str) -> None:
    """Refuse GGUF files of a model that is not supported, where the hub says what they hold."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE or _no_way(constants.ENDPOINT) is not None:
        return
    try:
        found = HfApi().model_info(repo_id, revision=commit, expand=["gguf"]).gguf
    except (HfHubHTTPError, *_network_errors(), OSError, ValueError):
        return  # a mirror without this call; the file itself says it
    architecture = found.get("architecture") if isinstance(found, dict) else None
    if isinstance(architecture, str) and architecture not in FAMILIES:
        raise CheckpointError(
            f"{repo_id} has GGUF files of the architecture {architecture!r}, which is not "
            f"supported; {instead(architecture, {})}"
        )


def choose_gguf(names: Iterable[str], tag: str, repo_id: str) -> str:
    """Choose the file of a quantization.

    Raises:
        CheckpointError: the tag fits no file, or several.
    """
    models = _gguf_models(names)
    found = [
        name for name, label in models.items() if tag in (label, Path(name).name, Path(name).stem)
    ] or [name for name, label in models.items() if label.lower() == tag.lower()]
    if not models:
        raise CheckpointError(
            f"{repo_id} has no GGUF file; leave out :{tag}, or give a branch with --revision"
        )
    if not found:
        raise CheckpointError(
            f"{repo_id} has no GGUF file {tag}; it has {', '.join(sorted(set(models.values())))}"
        )
    if len(found) == 1 and not _PART.search(Path(found[0]).stem):
        return found[0]
    if all(_PART.search(Path(name).stem) for name in found):
        raise CheckpointError(
            f"{repo_id} has {tag} in {len(found)} parts; download them, join them with "
            "llama-gguf-split --merge, and export that file"
        )
    raise CheckpointError(
        f"{repo_id} has several files {tag}: {', '.join(found)}; give the name of one instead"
    )


def _file_names(repo_id: str, directory: Path) -> list[str]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE or _no_way(constants.ENDPOINT) is not None:
        return [str(path.relative_to(directory)) for path in directory.rglob("*.gguf")]
    try:
        files = HfApi().list_repo_tree(repo_id, revision=directory.name, recursive=True)
        return [file.path for file in files]
    except (HfHubHTTPError, *_network_errors(), OSError, ValueError) as error:
        raise CheckpointError(
            f"{repo_id}: {_named(constants.ENDPOINT)} does not list its files ({error}); download "
            "the GGUF file, and give its path"
        ) from error


def _gguf_models(names: Iterable[str]) -> dict[str, str]:
    """Return the quantization of each GGUF file of a model; its name, if that states none."""
    models = {}
    for name in sorted(names):
        path = Path(name)
        if path.suffix.lower() != ".gguf" or path.name.lower().startswith(_NO_MODEL):
            continue
        stem = _PART.sub("", path.stem)
        label = _LABEL.search(stem)
        models[name] = stem if label is None else label[1]
    return models


def _missing_bytes(repo_id: str, commit: str, directory: Path) -> int | None:
    """Count the bytes of weights missing in a snapshot's directory; None if that is not known."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE or _no_way(constants.ENDPOINT) is not None:
        return 0 if _has_weights(directory) else None  # a missing file ends the next step
    try:
        files = list(HfApi().list_repo_tree(repo_id, revision=commit))
    except (HfHubHTTPError, *_network_errors(), OSError, ValueError):
        return None  # a mirror without this call; the download itself tells what is wrong
    return sum(
        getattr(file, "size", 0)
        for file in files
        if any(fnmatch(file.path, pattern) for pattern in _WEIGHT_FILES)
        and not (directory / file.path).exists()
    )


def _has_weights(directory: Path) -> bool:
    """Return whether a snapshot has the weights that its index names; any without an index."""
    index = directory / "model.safetensors.index.json"
    text = index.read_bytes() if index.exists() else b""
    if names := re.findall(rb'"([\w.-]+\.safetensors)"', text):
        return all((directory / name.decode()).exists() for name in names)
    return any(any(directory.glob(pattern)) for pattern in _WEIGHT_FILES)


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what a broken connection raises besides OSError, as huggingface-hub below 1.0 does."""
    try:
        from httpx import HTTPError
    except ImportError:
        return ()
    return (HTTPError,)


def _snapshot(
    repo_id: str, revision: str | None, cache_dir: Path | None, patterns: list[str]
) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise DependencyError(
            f"downloading {repo_id} needs huggingface-hub; run: {install_command('export')}"
        ) from error
    lack = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_way(constants.ENDPOINT)
    try:
        with _quiet_library():
            return Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    allow_patterns=patterns,
                    local_files_only=lack is not None,  # instead of six tries with pauses
                )
            )
    except GatedRepoError as error:  # before its base class RepositoryNotFoundError
        problem = (
            "is gated and this account has no access; accept its terms on the hub, then set "
            "HF_TOKEN"
        )
        cause: Exception = error
    except RepositoryNotFoundError as error:
        problem = (
            "was not found on the hub; check the spelling, or set HF_TOKEN if it is private "
            "(for a mirror set HF_ENDPOINT, for ModelScope --hub modelscope)"
        )
        cause = error
    except RevisionNotFoundError as error:
        problem = f"has no revision {revision!r}; give a branch, a tag or a full commit"
        cause = error
    except LocalEntryNotFoundError as error:
        lack = lack or f"{_named(constants.ENDPOINT)} fails ({error.__cause__ or error})"
        problem = (
            f"is not whole in the local cache, and {lack}; mend that, try --hub modelscope, or "
            "give a directory that was downloaded elsewhere"
        )
        cause = error
    except HFValidationError as error:
        problem = f"is no hub id ({error}); give owner/name"
        cause = error
    except Exception as error:
        # Errors of its HTTP client come through; the client depends on its version.
        client = type(error).__module__.startswith("httpx")
        if not client and not isinstance(error, HfHubHTTPError | OSError):
            raise
        problem = (
            f"could not be downloaded from {_named(constants.ENDPOINT)} ({error}); run the same "
            "command again to resume"
        )
        cause = error
    raise CheckpointError(f"{repo_id} {problem}") from cause


def _no_way(endpoint: str) -> str | None:
    """Say why no connection to the hub can be made; None if one can, or if a proxy does.

    The library asks six times with pauses, and logs each.
    """
    url = urlsplit(endpoint)
    host = url.hostname or ""
    proxies = urllib.request.getproxies()
    if (url.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
        return None
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"{_named(endpoint)} cannot be reached ({error.strerror or error})"
    return None


def _named(endpoint: str) -> str:
    whence = "HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "the Hugging Face hub"
    return f"{urlsplit(endpoint).netloc} ({whence})"


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the library's warnings off the terminal, unless ``HF_HUB_VERBOSITY`` asks for them."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    if not os.environ.get("HF_HUB_VERBOSITY"):
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
