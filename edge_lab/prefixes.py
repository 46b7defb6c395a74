"""Computes prefixes to store: tokens that prompts begin with, and their rows of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edge.backends import Backend
from edge.backends.step import prefill
from edge.bundle.embeddings import EmbeddingTable
from edge.errors import ConfigError, ContextLengthError, RequestError
from edge.logprobs import check_finite
from edge.model.slot_rows import SlotRows
from edge.runtime.kv_cache import common_prefix
from edge.user_paths import user_directory


def default_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/edge-llm/prefixes``, by the XDG base directory specification.

    Raises:
        ConfigError: the user has no home for it.
    """
    root = user_directory("XDG_CACHE_HOME", ".cache")
    if root is None:
        raise ConfigError("this user has no home directory; give --prefix-dir or XDG_CACHE_HOME")
    return root / "edge-llm" / "prefixes"


def stable_prefix(encode: Callable[[str], list[int]]) -> list[int]:
    """Find the tokens that a prompt begins with, whatever its variable part is.

    The last tokens before that part may merge with it. So two parts that have nothing in common
    are tried, and the tokens that both prompts share are taken.

    Args:
        encode: turns a variable part into the tokens of the whole prompt.
    """
    return (first := encode("1"))[: common_prefix(first, encode(" x"))]


def compute_rows(backend: Backend, embeddings: EmbeddingTable, ids: Sequence[int]) -> SlotRows:
    """Prefill the first slot and read its rows; nothing else may use the backend meanwhile.

    Raises:
        RequestError: no tokens, or an id outside the table.
        ContextLengthError: the tokens leave no row of the cache for the answer.
        BackendError: the engine failed, or its logits are not finite.
    """
    if not ids:
        raise RequestError("the prefix has no tokens; give a longer text")
    if len(ids) >= backend.capacity:
        raise ContextLengthError(len(ids), backend.capacity)
    for _, logits in prefill(backend, embeddings, ids):
        check_finite(logits)
    return backend.read_slot(0, len(ids))
