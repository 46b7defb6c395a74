"""A stand-in of a GPU for tests that measure an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu()
    install(monkeypatch, device)
    with emptied(device):
        yield device
