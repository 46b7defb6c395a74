"""One service for most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Bundles

from .scripted import Live, running


@pytest.fixture(scope="session")
def live(tiny_bundles: Bundles) -> Iterator[Live]:
    with running(tiny_bundles("qwen2"), max_body_bytes=300_000, max_choices=8) as service:
        yield service
