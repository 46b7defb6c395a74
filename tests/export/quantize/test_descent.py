"""Coordinate descent: the error that it lowers, and what it may store."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from export.quantize.descent import descend
from export.quantize.gptq import DAMPING, gptq_factor, gptq_rows
from export.quantize.rtn import QuantizedRows, dequantize_rows, quantize_rows
from export.quantize.statistics import second_moment
from export.quantize.triangular import damp
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints
from tests.export.quantize.layers import plan_blocks, run_layers
from tests.export.quantize.test_error_feedback import gptq
from tests.export.quantize.test_gptq import correlated, weights
from tests.parity import Golden

FP16 = np.dtype(np.float16)
INT4 = TensorScheme(kind="int4", group_size=32)


def damped_moments(tokens: int, width: int, seed: int) -> NDArray[np.float32]:
    moments = second_moment(correlated(tokens, width, seed))
    damp(moments, 0.05)
    return moments


def error(w: NDArray[np.float32], rows: QuantizedRows, moments: NDArray[np.float32]) -> float:
    lost = dequantize_rows(rows).astype(np.float64) - w
    return float(np.einsum("ri,ij,rj->", lost, moments.astype(np.float64), lost))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 6),
    tokens=st.integers(1, 200),
    seed=st.integers(0, 1000),
    by_gptq=st.booleans(),
)
def test_never_worse_than_what_it_began_with(
    rows: int, groups: int, tokens: int, seed: int, by_gptq: bool
):
    moments, w = damped_moments(tokens, 32 * groups, seed), weights(rows, 32 * groups, seed + 1)
    start = quantize_rows(w, INT4, "mse", FP16)
    if by_gptq:
        start = gptq_rows(w, INT4, gptq_factor(moments), FP16)
    found = descend(w, start, INT4, moments, FP16, 1)
    assert error(w, found, moments) <= error(w, start, moments) * (1 + 1e-5)
    assert found.values.min() >= -8
    assert found.values.max() <= 7
    assert (found.scales > 0).all()
    np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16))


def test_much_is_left_for_it_after_gptq_and_less_after_each_sweep():
    moments, w = damped_moments(1000, 256, 5), weights(100, 256, 6)
    start = gptq_rows(w, INT4, gptq_factor(moments), FP16)
    losses = [error(w, descend(w, start, INT4, moments, FP16, n), moments) for n in range(4)]
    assert losses[0] == error(w, start, moments)
    assert losses[1] < 0.96 * losses[0]
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_in_the_end_no_integer_alone_could_be_better():
    moments, w = damped_moments(300, 64, 7), weights(5, 64, 8)
    start = quantize_rows(w, INT4, "mse", FP16)
    found = descend(w, start, INT4, moments, FP16, 60)
    least = [error(w[r : r + 1], _row(found, r), moments) for r in range(5)]
    for row in range(5):
        for column in range(64):
            for step in (-1, 1):
                other = _row(found, row)
                value = int(other.values[0, column]) + step
                if -8 <= value <= 7:
                    other.values[0, column] = value
                    assert error(w[row : row + 1], other, moments) > least[row] * (1 - 1e-4)


def _row(rows: QuantizedRows, at: int) -> QuantizedRows:
    return QuantizedRows(rows.values[at : at + 1].copy(), rows.scales[at : at + 1].copy())


def test_a_scale_that_is_off_is_fitted():
    """Integers that are right with a scale that is not: the error is quadratic in the scale."""
    moments = damped_moments(100, 32, 9)
    values = np.random.RandomState(1).randint(-8, 8, (6, 32)).astype(np.int8)
    scales = np.full((6, 1), 0.0625, np.float32)
    w = dequantize_rows(QuantizedRows(values, scales))
    start = QuantizedRows(values, scales * np.float32(1.03125))
    found = descend(w, start, INT4, moments, FP16, 20)
    assert error(w, found, moments) < 1e-6 * error(w, start, moments)


@pytest.mark.parametrize("scale_type", [np.float16, ml_dtypes.bfloat16])
def test_what_is_exact_stays_as_it_is(scale_type: type):
    values = np.random.RandomState(0).randint(-8, 8, (20, 96)).astype(np.int8)
    start = QuantizedRows(values, np.full((20, 3), 0.0625, np.float32))
    moments = damped_moments(50, 96, 3)
    found = descend(dequantize_rows(start), start, INT4, moments, np.dtype(scale_type), 2)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.scales, start.scales)


def test_scales_are_of_the_type_that_stores_them():
    moments, w = damped_moments(200, 64, 11), weights(20, 64, 12)
    dtype = np.dtype(ml_dtypes.bfloat16)
    start = quantize_rows(w, INT4, "mse", dtype)
    scales = descend(w, start, INT4, moments, dtype, 2).scales
    assert not np.array_equal(scales, start.scales)
    np.testing.assert_array_equal(scales, scales.astype(dtype).astype(np.float32))


def test_rows_do_not_depend_on_their_tile_and_nothing_is_changed_in_place(
    monkeypatch: pytest.MonkeyPatch,
):
    moments, w = damped_moments(200, 64, 11), weights(50, 64, 12)
    start = gptq_rows(w, INT4, gptq_factor(moments), FP16)
    before = (start.values.copy(), start.scales.copy(), w.copy(), moments.copy())
    whole = descend(w, start, INT4, moments, FP16, 2)
    for array, copy in zip((start.values, start.scales, w, moments), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    monkeypatch.setattr("export.quantize.descent._ROWS", 7)
    tiled = descend(w, start, INT4, moments, FP16, 2)
    assert (whole.values == tiled.values).mean() > 0.99


def test_channels_that_are_never_used_do_no_harm():
    w = weights(10, 64, 10)
    moments = np.zeros((64, 64), np.float32)
    damp(moments, 0.05)
    start = quantize_rows(w, INT4, "mse", FP16)
    found = descend(w, start, INT4, moments, FP16, 1)
    np.testing.assert_allclose(dequantize_rows(found), w, atol=0.05)


def test_an_export_rounds_by_it(tiny_checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    """The first linear's, which makes up for nothing: its error is the float weights'."""
    ids = Golden.load("qwen2").ids[None, :64]
    losses = []
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        moments = second_moment(run_layers(checkpoint, ids)[0].inputs["qkv"])
        damp(moments, DAMPING)
        for sweeps in (0, None):
            if sweeps is not None:
                monkeypatch.setattr("export.quantize.calibrated._SWEEPS", sweeps)
            first = plan_blocks(gptq(checkpoint, ids, "gptq"))[0].linears[0]
            monkeypatch.undo()
            assert first.kept is not None
            losses.append(0.0)
            for name, part in zip(first.layer.weights, first.kept, strict=True):
                exact = checkpoint.tensor(name).astype(np.float32)
                losses[-1] += error(exact, QuantizedRows(part.codes, part.scales), moments)
    assert losses[1] < 0.98 * losses[0]
