"""Fixtures for tests of engines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Bundles
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", "native", "int4"), tmp_path / "bundle"))


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    device = FakeGpu()
    device.push()  # the build reads the layers, for which TensorRT takes the primary context
    with emptied(device):
        yield device
        device.pop()
