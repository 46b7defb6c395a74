"""The rotation of a linear's inputs in blocks: exact in every float type, and it cancels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.graph.block_rotation import block_size, hadamard, rotate_blocks


@given(width=st.integers(1, 20_000))
def test_blocks_divide_the_width(width: int):
    size = block_size(width)
    assert size in (0, 4, 16, 64)
    assert width % size == 0 if size else width % 4
    assert size == 64 or not size or width % (4 * size)


@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_matrix_is_its_own_inverse_in_any_type(size: int, dtype: type):
    stored = hadamard(size).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(stored, hadamard(size))
    np.testing.assert_array_equal(stored @ stored, np.eye(size))
    np.testing.assert_array_equal(stored, stored.T)


@given(width=st.sampled_from([3, 8, 48, 192]), seed=st.integers(0, 99))
def test_products_stay_as_they_are(width: int, seed: int):
    random = np.random.RandomState(seed)
    x, weights = (random.randint(-8, 9, (5, width)).astype(np.float16) for _ in range(2))
    size = block_size(width)
    found = rotate_blocks(x, size) @ rotate_blocks(weights, size).T
    np.testing.assert_array_equal(found, x.astype(np.float32) @ weights.astype(np.float32).T)


def test_a_loud_channel_is_spread_over_its_block():
    x = np.zeros((1, 192), np.float32)
    x[0, 70] = 80
    rotated = np.abs(rotate_blocks(x, 64)).reshape(3, 64)
    assert (rotated[1] == 10).all()
    assert not rotated[[0, 2]].any()
