"""bf16 as bits, which NumPy has not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from edge.backends.ort.float_bits import from_storage, to_storage


@given(st.lists(st.floats(width=32), max_size=20))
def test_bf16_bits_are_those_of_ml_dtypes(values: list[float]):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array(values, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = array.astype(ml_dtypes.bfloat16)
    found = from_storage(to_storage(array, "bf16"), "bf16")
    assert_array_equal(found, expected.astype(np.float32))


def test_bf16_round_trip_is_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_storage(bits, "bf16")
    finite = ~np.isnan(values)
    assert_array_equal(to_storage(values, "bf16")[finite], bits[finite])
