"""A table of tokens for tests of the runtime on a scripted backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge.bundle.embeddings import EmbeddingTable
from tests.standins.scripted_backend import write_table

VOCAB = 50


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingTable]:
    path = tmp_path_factory.mktemp("table") / "embeddings.safetensors"
    opened = EmbeddingTable(write_table(path, VOCAB))
    yield opened
    opened.close()
