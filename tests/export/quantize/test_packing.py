"""INT4 packing: the inverse gives the values back, and the bytes are those of onnx itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge.bundle.schemes import HIGH_PLANE, PLANES_RANGE
from export.quantize.packing import pack_int4, split_planes, unpack_int4

int4_arrays = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
    elements=st.integers(-8, 7),
)


@settings(deadline=None, max_examples=200)
@given(int4_arrays)
def test_every_shape_comes_back_and_equals_onnx(values: NDArray[np.int8]):
    packed = pack_int4(values)
    assert packed.dtype == np.uint8
    assert packed.shape == ((values.size + 1) // 2,)
    restored = unpack_int4(packed, values.shape)
    assert restored.dtype == np.int8
    np.testing.assert_array_equal(restored, values)
    proto = onnx.numpy_helper.from_array(values.astype(ml_dtypes.int4))
    assert packed.tobytes() == proto.raw_data


@settings(deadline=None, max_examples=50)
@given(int4_arrays.filter(lambda values: values.ndim == 2))
def test_a_transposed_view_packs_in_its_own_order(values: NDArray[np.int8]):
    """The exporter hands over transposed rows; the memory behind them has another order."""
    np.testing.assert_array_equal(pack_int4(values.T), pack_int4(values.T.copy()))


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(
        np.int8,
        hnp.array_shapes(max_dims=3, max_side=9),
        elements=st.integers(*PLANES_RANGE),
    )
)
def test_planes_add_up_to_the_integers(values: NDArray[np.int8]):
    low, high = (unpack_int4(plane, values.shape) for plane in split_planes(values))
    np.testing.assert_array_equal(HIGH_PLANE * high.astype(np.int16) + low, values)


def test_the_range_of_planes_is_all_of_int8_that_they_hold():
    every = np.arange(-128, 128, dtype=np.int8)
    low, high = (unpack_int4(plane, every.shape) for plane in split_planes(every))
    exact = every[HIGH_PLANE * high.astype(np.int16) + low == every]
    assert exact.tolist() == list(range(PLANES_RANGE[0], PLANES_RANGE[1] + 1))


def test_the_first_value_lies_in_the_low_nibble():
    assert pack_int4(np.array([1, -2, -8], np.int8)).tolist() == [0xE1, 0x08]
