from __future__ import annotations

from pathlib import Path

import pytest

from tests.edge.device import jetson_trees as trees
from tests.edge_lab.doctor.fake_machine import FakeMachine, make_orin


@pytest.fixture
def laptop(tmp_path: Path) -> FakeMachine:
    trees.write_tree(tmp_path, {"proc/meminfo": trees.MEMINFO})
    return FakeMachine(tmp_path)


@pytest.fixture
def orin(tmp_path: Path) -> FakeMachine:
    return make_orin(tmp_path / "orin")
