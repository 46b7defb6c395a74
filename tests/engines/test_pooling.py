"""Engines of bundles that embed or judge: compiled and audited, and run by the runner."""

from __future__ import annotations

import pytest

from engines.check.check import check_bundle
from engines.config import BuildConfig
from tests.conftest import PoolingBundles

pytest.importorskip("tensorrt_rtx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "dialect", "quant"),
    [("embed", "native", "int4"), ("embed", "portable", "fp16"), ("rerank", "native", "int8")],
)
def test_they_compile_and_pass_the_audit(
    task: str, dialect: str, quant: str, pooling_bundles: PoolingBundles
) -> None:
    bundle = pooling_bundles(task, dialect, quant)  # type: ignore[arg-type]
    report = check_bundle(BuildConfig(bundle, max_prefill=32, max_batch=4))
    assert report.problems == ()
    assert report.plan_bytes > 0
