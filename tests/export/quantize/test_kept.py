"""Integers of others in the graph's form: the same weights, or said how far from them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.bundle.manifest import TensorScheme
from edge.bundle.schemes import HIGH_PLANE
from export.quantize.kept import CarriedRows, carry_rows
from export.quantize.linear import convert_kept
from export.quantize.packing import split_planes, unpack_int4
from export.quantize.rtn import LEAST_SCALE
from export.sources.quantized_weight import QuantizedWeight

FP16: np.dtype[Any] = np.dtype(np.float16)
BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
ALL = slice(None)


def random_weight(
    rng: np.random.RandomState,
    bits: int,
    *,
    symmetric: bool,
    group_size: int = 64,
    width: int = 128,
) -> QuantizedWeight:
    half, groups = 1 << (bits - 1), width // group_size
    codes = rng.randint(-half, half, size=(6, width)).astype(np.int8)
    zeros = rng.randint(-half, half, size=(6, groups)).astype(np.int16)
    scales = rng.uniform(0.001, 2, size=(6, groups)) * rng.choice([-1, 1], size=(6, groups))
    stored = scales.astype(np.float16).astype(np.float32)
    return QuantizedWeight(bits, codes, zeros * (not symmetric), stored)


def weights_of(rows: CarriedRows, most: int = 127) -> NDArray[np.float32]:
    """What the graph multiplies with: ``s * c + s * o``; ``c`` is at most ``most``."""
    count = rows.scales.shape[1]
    wide = rows.values.astype(np.float32)
    wide[wide > most] -= 256
    groups = wide.reshape(len(rows.values), count, -1)
    groups = groups * rows.scales[..., None] + rows.offsets[..., None]
    return groups.reshape(rows.values.shape)


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 4]),
    symmetric=st.booleans(),
    size=st.sampled_from([32, 64]),
)
def test_four_bits_of_any_zero_point_and_sign_are_kept(
    seed: int, bits: int, symmetric: bool, size: int
) -> None:
    weight = random_weight(np.random.RandomState(seed), bits, symmetric=symmetric)
    rows = carry_rows(weight, ALL, TensorScheme("int4", size), FP16)
    assert rows.values.min() >= -8
    assert rows.values.max() <= 7
    assert (rows.scales > 0).all()
    # Products of 4-bit integers and fp16 scales are exact in fp32, and so is their sum.
    assert_array_equal(weights_of(rows), weight.dequantize())
    assert (rows.changed_groups, rows.squared_error) == (0, 0.0)


def test_symmetric_codes_go_as_they_are() -> None:
    weight = random_weight(np.random.RandomState(0), 4, symmetric=True)
    positive = QuantizedWeight(4, weight.codes, weight.zeros, np.abs(weight.scales))
    rows = carry_rows(positive, ALL, TensorScheme("int4", 64), FP16)
    assert_array_equal(rows.values, weight.codes)
    assert_array_equal(rows.scales, positive.scales)
    assert not rows.offsets.any()


@given(seed=st.integers(0, 2**32 - 1), symmetric=st.booleans(), narrow=st.integers(1, 40))
def test_eight_bits_of_any_zero_point_and_sign_are_kept(
    seed: int, symmetric: bool, narrow: int
) -> None:
    weight = random_weight(np.random.RandomState(seed), 8, symmetric=symmetric)
    weight.codes[:3] //= narrow
    rows = carry_rows(weight, ALL, TensorScheme("int8", 64, planes=True), FP16)
    exact = weight.dequantize()
    assert_array_equal(weights_of(rows, 119), exact)
    low, high = split_planes(rows.values)
    planes = [unpack_int4(plane, exact.shape).astype(np.float32) for plane in (low, high)]
    stored = (planes[0] + HIGH_PLANE * planes[1]).reshape(6, 2, -1)
    whole = stored * rows.scales[..., None] + rows.offsets[..., None]
    assert_array_equal(whole.reshape(exact.shape), exact)
    assert (rows.changed_groups, rows.squared_error) == (0, 0.0)
    assert np.isclose(rows.squared_norm, np.square(exact.astype(np.float64)).sum(), rtol=1e-5)


def test_the_whole_range_of_int8_is_shifted_where_it_reaches_beyond_the_planes() -> None:
    codes = np.repeat(np.array([[-120, 127], [-128, 127], [-128, 119]], np.int8), 32, axis=1)
    scales = np.full((3, 1), 0.5, np.float32)
    weight = QuantizedWeight(8, codes, np.zeros((3, 1), np.int16), scales)
    rows = carry_rows(weight, ALL, TensorScheme("int8", 64, planes=True), FP16)
    assert_array_equal(rows.offsets[:, 0], [4, 4, 0])
    assert_array_equal(weights_of(rows, 119), codes * np.float32(0.5))


def test_scales_that_the_graph_cannot_hold_are_rounded_anew() -> None:
    codes = np.repeat(np.array([[-7, 7], [-7, 7], [0, 0]], np.int8), 32, axis=1)
    scales = np.array([[2.0**-14], [2.0**-16], [0]], np.float32)
    weight = QuantizedWeight(4, codes, np.zeros((3, 1), np.int16), scales)
    rows = carry_rows(weight, ALL, TensorScheme("int4", 64), FP16)
    assert (rows.scales >= LEAST_SCALE).all()
    assert rows.changed_groups == 1
    assert_array_equal(rows.values[0], codes[0])
    assert_array_equal(weights_of(rows)[1], np.sign(codes[1]) * np.float32(2.0**-13))
    assert not weights_of(rows)[2].any()


def test_bf16_graphs_round_the_scales_of_fp16_and_say_how_far() -> None:
    weight = random_weight(np.random.RandomState(1), 4, symmetric=False)
    rows = carry_rows(weight, ALL, TensorScheme("int4", 64), BF16)
    exact = weight.dequantize()
    error = np.square((weights_of(rows) - exact).astype(np.float64)).sum()
    assert 0 < rows.squared_error < 2**-16 * rows.squared_norm
    assert np.isclose(rows.squared_error, error, rtol=1e-3)
    assert rows.changed_groups == 0


def test_inputs_in_int8_take_no_offsets() -> None:
    codes = np.full((1, 64), -128, np.int8)
    weight = QuantizedWeight(
        8, codes, np.zeros((1, 1), np.int16), np.full((1, 1), -0.5, np.float32), input_scale=1.0
    )
    rows = carry_rows(weight, ALL, TensorScheme("w8a8"), FP16)
    assert not rows.offsets.any()
    assert rows.changed_groups == 1  # +128 is no INT8
    assert np.allclose(weights_of(rows), 64, rtol=0.01)


@given(seed=st.integers(0, 2**32 - 1), symmetric=st.booleans())
def test_a_layer_of_parts_in_another_order(seed: int, symmetric: bool) -> None:
    """Tiles, packing and transposition: the graph's matrix is the stacked parts', reordered."""
    rng = np.random.RandomState(seed)
    parts = [random_weight(rng, 4, symmetric=symmetric) for _ in range(2)]
    order = rng.permutation(128).astype(np.int64)
    counts: list[int] = []
    # The groups of a reordered weight follow each other in the new order.
    tensors = convert_kept(parts, TensorScheme("int4", 64), FP16, order, counts.append)
    assert tensors.scale is not None
    values = unpack_int4(tensors.weight.view(np.uint8).reshape(-1), (128, 12)).astype(np.float32)
    matrix = values.reshape(2, 64, 12) * tensors.scale[:, None]
    if tensors.offset is not None:
        matrix = matrix + tensors.offset[:, None]
    grouped = [
        QuantizedWeight(4, part.codes[:, order], part.zeros, part.scales).dequantize()
        for part in parts
    ]
    assert_array_equal(matrix.reshape(128, 12), np.concatenate(grouped).T)
    assert sum(counts) == 2 * 6 * 128
    assert (tensors.num_groups, tensors.changed_groups, tensors.relative_error) == (24, 0, 0.0)
