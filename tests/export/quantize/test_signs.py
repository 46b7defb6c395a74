"""Signs of channels: groups whose largest weight is positive are turned around where it pays."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from export.quantize.rtn import dequantize_rows, quantize_rows
from export.quantize.signs import channel_signs
from tests.export.quantize.test_gptq import FP16, INT4

Array = NDArray[np.float32]


def draw(rows: int, width: int, seed: int) -> tuple[Array, Array]:
    """Bell-shaped weights, and importances that span a factor of 100."""
    random = np.random.RandomState(seed)
    weights = random.normal(size=(rows, width)).astype(np.float32)
    return weights, (10 ** random.uniform(-1, 1, width)).astype(np.float32)


def error_of(weights: Array, importance: Array) -> float:
    rows = quantize_rows(weights, INT4, "mse", FP16, importance)
    return float((np.square(dequantize_rows(rows) - weights) * importance).sum(dtype=np.float64))


@pytest.mark.parametrize("seed", range(5))
def test_less_is_lost_in_the_weighted_error(seed: int):
    """The fewer rows share a column's sign, the more: more than 2 % with 128."""
    weights, importance = draw(128, 192, seed)
    signs = channel_signs(weights, INT4, importance)
    assert set(np.unique(signs)) == {-1, 1}
    assert error_of(weights * signs, importance) < 0.98 * error_of(weights, importance)


def test_the_largest_weight_of_a_group_becomes_the_negative_end():
    weights = np.full((1, 64), 0.25, np.float32)
    weights[0, 5], weights[0, 40] = 2, -2
    signs = channel_signs(weights, INT4, np.ones(64, np.float32))
    assert signs[5] == -1
    assert signs[40] == 1
    rows = quantize_rows(weights * signs, INT4, "mse", FP16)
    assert (rows.values[0, 5], rows.values[0, 40]) == (-8, -8)
    np.testing.assert_array_equal(dequantize_rows(rows) * signs, weights)


def test_rows_with_large_weights_and_groups_of_large_inputs_decide():
    weights = np.full((3, 64), 0.01, np.float32)
    weights[:, 3] = [1, -1.5, 1]  # 1.5 squared outweighs 1 + 1
    weights[:, 40] = [1, -1.5, 1.2]
    assert channel_signs(weights, INT4, np.ones(64, np.float32))[[3, 40]].tolist() == [1, -1]
    shared = np.arange(64) % 37  # 3 and 40 decide together
    importance = np.ones(64, np.float32)
    assert channel_signs(weights, INT4, importance, shared)[[3, 40]].tolist() == [1, 1]
    importance[32:] = 100
    assert channel_signs(weights, INT4, importance, shared)[[3, 40]].tolist() == [-1, -1]


def test_a_dead_group_stays_as_it_is():
    weights = np.zeros((4, 64), np.float32)
    np.testing.assert_array_equal(channel_signs(weights, INT4, np.zeros(64, np.float32)), 1)
