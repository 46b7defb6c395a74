"""Prefixes that are to be stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import ConfigError, ContextLengthError, RequestError
from edge.runtime.llm import LLM
from edge_lab.prefixes import compute_rows, default_directory, stable_prefix
from tests.conftest import Bundles


def test_the_default_directory_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "edge-llm" / "prefixes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "edge-llm" / "prefixes"


@pytest.mark.usefixtures("homeless")
def test_without_a_home_there_is_no_default_directory() -> None:
    with pytest.raises(ConfigError, match="give --prefix-dir or XDG_CACHE_HOME"):
        default_directory()


def test_prompts_that_cannot_be_prefilled_are_refused(tiny_bundles: Bundles) -> None:
    with LLM(tiny_bundles("qwen2"), kv_capacity=64) as llm:
        with pytest.raises(RequestError, match="no tokens"):
            compute_rows(llm.backend, llm.embeddings, [])
        with pytest.raises(ContextLengthError):
            compute_rows(llm.backend, llm.embeddings, [1] * llm.backend.capacity)


def test_a_stable_prefix_is_shared_by_all_continuations() -> None:
    assert stable_prefix(lambda rest: [1, 2, ord(rest[0]), 3]) == [1, 2]
    assert stable_prefix(lambda rest: [len(rest)]) == []
