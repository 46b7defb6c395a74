"""Download a checkpoint from the Hugging Face hub, or find it in the local cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge.errors import CheckpointError, DependencyError, install_command

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
    # Of sentence-transformers.
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
]
# Without a directory part: original/consolidated.*.safetensors would be the same weights twice.
_WEIGHT_FILES = ["model.safetensors", "model-*-of-*.safetensors", "gptq_model-*.safetensors"]


def download(
    repo_id: str, revision: str | None, cache_dir: Path | None, check: Callable[[Path], object]
) -> tuple[Path, str]:
    """Fetch one revision of a repository: first the small files, then the weights.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; None is the default branch.
        cache_dir: the hub's cache; None is the one of ``HF_HOME``.
        check: called with the directory before any weights are fetched; what it raises ends the
            download.

    Returns:
        The snapshot's directory and its commit.

    Raises:
        CheckpointError: not found, no access, no network, or no such revision.
        DependencyError: huggingface-hub is not installed.
    """
    directory = _snapshot(repo_id, revision, cache_dir, TEXT_FILES)
    check(directory)
    # The cache names each snapshot after its commit (huggingface_hub, "Understand caching"), so
    # both steps and the manifest speak of the same one, even if the branch moves in between.
    commit = directory.name
    return _snapshot(repo_id, commit, cache_dir, TEXT_FILES + _WEIGHT_FILES), commit


def _snapshot(
    repo_id: str, revision: str | None, cache_dir: Path | None, patterns: list[str]
) -> Path:
    try:
        from huggingface_hub import snapshot_download
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
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
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
        problem = (
            "is not whole in the local cache and the hub cannot be reached; check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, try --hub modelscope, or give a directory that was "
            "downloaded elsewhere"
        )
        cause = error
    except HFValidationError as error:
        problem = f"is no hub id ({error}); give owner/name"
        cause = error
    except (HfHubHTTPError, OSError) as error:
        problem = f"could not be downloaded ({error}); run the same command again to resume"
        cause = error
    raise CheckpointError(f"{repo_id} {problem}") from cause
