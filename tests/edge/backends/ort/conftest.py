"""How a graph may be run by ONNX Runtime."""

from __future__ import annotations

import pytest

from tests.conftest import require_kernels


@pytest.fixture(params=("native fused", "native as exported", "portable"))
def variant(request: pytest.FixtureRequest) -> str:
    require_kernels(request.param.split()[0])
    return str(request.param)
