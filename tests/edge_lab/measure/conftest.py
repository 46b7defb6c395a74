"""A stand-in of a GPU for tests that measure an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda import FakeGpu
from tests.fake_tensorrt import emptied, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu()
    install(monkeypatch, device)
    with emptied(device):
        yield device
