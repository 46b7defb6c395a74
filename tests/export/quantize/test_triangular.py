"""Blocks give what NumPy gives for the whole matrix, at sizes around a block's too."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from export.quantize.triangular import _BLOCK, damp, factor_upper, solve_factored

SIZES = [1, 2, _BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK, 2 * _BLOCK + 45]


def moments(size: int) -> NDArray[np.float32]:
    """Second moments of correlated channels, damped as GPTQ does."""
    random = np.random.default_rng(size)
    x = random.normal(size=(2 * size + 3, size)) @ random.normal(size=(size, size))
    result: NDArray[np.float32] = (x.T @ x / len(x)).astype(np.float32)
    damp(result, 0.05)
    return result


@pytest.mark.parametrize("size", SIZES)
def test_the_factor_multiplies_to_the_matrix(size: int):
    matrix = moments(size)
    upper = matrix.copy()
    factor_upper(upper)
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper @ upper.T, matrix, rtol=1e-3, atol=1e-4 * matrix.max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("columns", [1, 7])
def test_the_solution_is_numpys(size: int, columns: int):
    matrix = moments(size)
    wanted = np.random.default_rng(0).normal(size=(size, columns)).astype(np.float32)
    expected = np.linalg.solve(matrix.astype(np.float64), wanted)
    upper = matrix.copy()
    factor_upper(upper)
    solve_factored(upper, wanted)
    np.testing.assert_allclose(wanted, expected, rtol=5e-3, atol=2e-3 * np.abs(expected).max())


def test_damping_is_a_share_of_the_mean_and_never_nothing():
    matrix = np.diag(np.array([1, 3], np.float32))
    damp(matrix, 0.5)
    np.testing.assert_array_equal(matrix, np.diag([2, 4]))
    silent = np.zeros((2, 2), np.float32)
    damp(silent, 0.5)
    np.testing.assert_array_equal(silent, np.diag([0.5, 0.5]))
