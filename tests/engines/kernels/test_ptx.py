"""The PTX that TensorRT takes into engines computes what NumPy does, run by the instruction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from engines.kernels import launch, reference
from engines.kernels.attention import attention
from engines.kernels.layout import pack_weights
from engines.kernels.package import load_ptx
from engines.kernels.top_k import top_k

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


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("join", [0, 1])
@pytest.mark.parametrize(
    ("starts", "heads", "tokens"),
    [
        ((0,), 3, 1),
        ((300, 5), 2, 3),
        ((9,), 2, 35),
    ],
)
def test_the_ptx_of_attention_does_too(
    starts: tuple[int, ...], heads: int, tokens: int, width: int, tile: int, join: int
):
    batch, groups, capacity = len(starts), 2, 310
    job = attention(batch, groups, heads, tokens, width, capacity, tile=tile, join=join)
    random = np.random.default_rng(tokens)
    arrays: dict[str, Any] = {
        name: random.standard_normal(shape).astype(dtype)
        for name, (shape, dtype) in job.buffers.items()
    }
    arrays["positions"] = (np.array(starts)[:, None] + np.arange(tokens)).astype(np.int32)
    for name in ("partial", "stats", "output"):
        arrays[name][...] = np.nan
    # What no program may read; an infinity would not stay unseen.
    for sequence, start in enumerate(starts):
        arrays["keys"][sequence, :, start:] = np.nan
        arrays["values"][sequence, :, start:] = np.nan
    for each, outputs in zip(job.launches, (("partial", "stats"), ("output",)), strict=True):
        used = {name: arrays[name] for name in each.arguments if isinstance(name, str)}
        run(load_ptx()[each.variant.name], each, used, outputs)
    inputs = ("query", "keys", "values", "new_keys", "new_values", "positions")
    exact = reference.attention(**{name: arrays[name] for name in inputs})
    # Weights are FP16 in the second product.
    assert np.abs(arrays["output"] - exact).max() <= 2.5e-3 * 4


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "keep"),
    [
        ("normal", 2, 4500, 256),
        ("few values", 1, 8200, 300),
        ("equal", 1, 4200, 200),
        ("strange", 1, 4500, 300),
        ("normal", 1, 9, 9),
    ],
)
def test_the_ptx_of_the_best_logits_does_too(kind: str, rows: int, columns: int, keep: int):
    random = np.random.default_rng(columns)
    logits = (random.standard_normal((rows, columns)) * 5).astype(np.float16)
    if kind == "few values":
        logits = random.integers(-2, 3, logits.shape).astype(np.float16)
    elif kind == "equal":
        logits[...] = -np.inf
    elif kind == "strange":
        few = [np.nan, -np.nan, -np.inf, 0.0, -0.0]
        logits = random.choice(few, logits.shape).astype(np.float16)
    job = top_k(rows, columns, keep)
    arrays: dict[str, Any] = {
        name: np.full(shape, -1, dtype) for name, (shape, dtype) in job.buffers.items()
    }
    arrays["logits"] = logits
    for each in job.launches:
        used = {name: arrays[name] for name in each.arguments if isinstance(name, str)}
        outputs = tuple(name for name in each.arguments[-3:] if isinstance(name, str))
        with np.errstate(invalid="ignore"):  # of infinities
            run(load_ptx()[each.variant.name], each, used, outputs)
    best, places, rest = reference.top_k(logits, keep)
    assert_array_equal(arrays["values"], best)
    assert_array_equal(arrays["places"], places)
    found = arrays["rest"][:, 0].astype(np.float64)
    bound = reference.top_k_error() * rest + 2 * columns * 2.0**-126
    assert ((np.abs(found - rest) <= bound) | (np.isnan(found) & np.isnan(rest))).all()
