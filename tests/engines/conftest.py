"""Fixtures for tests of engines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Bundles


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", "native", "int4"), tmp_path / "bundle"))
