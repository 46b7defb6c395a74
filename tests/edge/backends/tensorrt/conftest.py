from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles, require_kernels
from tests.edge.backends.tensorrt.gpu_runner import DIALECTS, ENGINE, EngineBundles
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied, install, write_engine


@pytest.fixture(scope="session")
def engine_bundles(
    tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> EngineBundles:
    """Tiny bundles with one engine; treat them as read-only."""
    root = tmp_path_factory.mktemp("engines")

    @functools.cache
    def make(kind: str, dialect: str, kv_cache: str, options: tuple[tuple[str, Any], ...]) -> Path:
        bundle = root / f"{kind}-{dialect}-{kv_cache}-{abs(hash(options))}"
        shutil.copytree(tiny_bundles(kind, dialect, kv_cache=kv_cache), bundle)  # type: ignore[arg-type]
        write_engine(bundle, **dict(options))
        return bundle

    def bundle(
        kind: str = "qwen2", dialect: str = "native", kv_cache: str = "float", **options: Any
    ) -> Path:
        require_kernels(dialect)
        merged = {**ENGINE, **options}
        if merged.get("kv_read", "slice") != "slice":
            merged.pop("kv_buckets")
        return make(kind, dialect, kv_cache, tuple(sorted(merged.items())))

    return bundle


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu(with_pycuda=getattr(request, "param", "pycuda") == "pycuda")
    install(monkeypatch, device)
    with emptied(device):
        yield device
    assert device.depth == 0


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)
