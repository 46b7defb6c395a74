"""The PTX that TensorRT takes into engines computes what NumPy does, run by the instruction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.kernels import launch, reference
from engines.kernels.layout import pack_weights
from engines.kernels.package import load_ptx

from .ptx import run

TACTICS = [tactic for planes in (1, 2) for tactic in launch.w4_tactics(planes)]


@pytest.mark.parametrize("tactic", TACTICS, ids=lambda tactic: tactic.variant.name)
@pytest.mark.parametrize(
    ("tiles", "rest", "columns", "depth", "group", "bias"),
    [
        (0, 1, 64, 32, 32, False),
        (1, 1, 70, 192, 64, True),
        (0, 5, 3, 256, 128, True),
    ],
)
def test_the_ptx_computes_what_numpy_does(
    tactic: launch.Tactic, tiles: int, rest: int, columns: int, depth: int, group: int, bias: bool
):
    rows, planes = tiles * tactic.rows + rest, int(tactic.variant.constants["PLANES"])
    random = np.random.default_rng(rows + columns)
    weights = [random.integers(-8, 8, (depth, columns), np.int8) for _ in range(planes)]
    arrays: dict[str, Any] = {
        "x": random.standard_normal((rows, depth)).astype(np.float16),
        "weights": pack_weights(weights),
        "scales": (random.uniform(0.2, 2, (depth // group, columns)) * 0.01).astype(np.float16),
        "bias": random.standard_normal(columns if bias else 1).astype(np.float16),
        "y": np.full((rows, columns), np.nan, np.float16),
    }
    job = launch.product(tactic, rows, columns, depth, group=group, bias=bias)
    run(load_ptx()[tactic.variant.name], job.launches[0], arrays)
    compute = getattr(reference, tactic.variant.function)
    exact, bound = compute(arrays["x"], weights, arrays["scales"], arrays["bias"] if bias else None)
    assert (np.abs(arrays["y"] - exact) <= bound).all()
