"""A streamed layer equals the whole layer at once, and means to ONNX Runtime what it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge.bundle.manifest import SchemeKind, TensorScheme
from edge.bundle.schemes import HIGH_PLANE
from edge.errors import CheckpointError
from export.quantize import linear
from export.quantize.linear import LinearTensors, convert_linear
from export.quantize.packing import pack_int4, split_planes, unpack_int4
from export.quantize.plan import nearest_rows
from export.quantize.rtn import TILE_ELEMENTS, dequantize_rows, quantize_rows

FP16: np.dtype[Any] = np.dtype(np.float16)
BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
SCHEMES = (
    TensorScheme(kind="float"),
    TensorScheme(kind="int8"),
    TensorScheme(kind="int8", group_size=32),
    TensorScheme(kind="int8", group_size=32, planes=True),
    TensorScheme(kind="int4", group_size=32),
    TensorScheme(kind="int4", group_size=64),
)


def make_parts(lengths: list[int], width: int, dtype: Any = BF16) -> list[NDArray[Any]]:
    rng = np.random.RandomState(sum(lengths))
    return [rng.normal(0, 0.05, (length, width)).astype(dtype) for length in lengths]


def convert(
    parts: list[NDArray[Any]],
    scheme: TensorScheme,
    clip: Literal["absmax", "mse"] = "mse",
    float_type: np.dtype[Any] = FP16,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[LinearTensors, list[int]]:
    counts: list[int] = []
    names = [f"part{i}.weight" for i in range(len(parts))]
    quantize = nearest_rows(scheme, clip, float_type)
    if quantize is not None:
        quantize = replace(quantize, tile_elements=tile_elements)
    with mock.patch.object(linear, "TILE_ELEMENTS", tile_elements):
        tensors = convert_linear(parts, names, scheme, quantize, float_type, counts.append)
    return tensors, counts


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    width=st.sampled_from([64, 192]),
    scheme=st.sampled_from(SCHEMES),
    clip=st.sampled_from(["absmax", "mse"]),
    source=st.sampled_from([BF16, FP16, np.dtype(np.float32)]),
    float_type=st.sampled_from([FP16, BF16]),
    tile_rows=st.integers(1, 6),
)
def test_streamed_equals_direct(
    lengths: list[int],
    width: int,
    scheme: TensorScheme,
    clip: Literal["absmax", "mse"],
    source: np.dtype[Any],
    float_type: np.dtype[Any],
    tile_rows: int,
):
    parts = make_parts(lengths, width, source)
    streamed, counts = convert(parts, scheme, clip, float_type, tile_rows * width)
    whole = np.concatenate([part.astype(np.float32) for part in parts])
    assert sum(counts) == whole.size
    if scheme.kind == "float":
        assert streamed.scale is None
        assert streamed.weight.dtype == float_type
        np.testing.assert_array_equal(
            streamed.weight.astype(np.float32), whole.T.astype(float_type).astype(np.float32)
        )
        return
    direct = quantize_rows(whole, scheme, clip, float_type)
    scales = direct.scales.T if scheme.group_size else direct.scales.T[0]
    assert streamed.scale is not None
    np.testing.assert_array_equal(streamed.scale, scales)
    values = np.ascontiguousarray(direct.values.T)
    high = None
    expected: NDArray[Any] = values
    if scheme.planes:
        expected, high = split_planes(values)
    elif scheme.kind == "int4":
        expected = pack_int4(values)
    assert streamed.weight.dtype == expected.dtype
    assert streamed.weight.tobytes() == expected.tobytes()
    assert (streamed.high_weight is None) == (high is None)
    if streamed.high_weight is not None and high is not None:
        assert streamed.high_weight.tobytes() == high.tobytes()


@pytest.mark.parametrize("lengths", [[48], [5, 2, 4], [7, 8]], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=str)
def test_onnx_runtime_reads_the_weights_that_were_meant(scheme: TensorScheme, lengths: list[int]):
    """DequantizeLinear on the stored bytes, written as the graph has it."""
    ort = pytest.importorskip("onnxruntime")
    parts = make_parts(lengths, 128)
    tensors, _ = convert(parts, scheme)
    assert tensors.scale is not None
    shape = (128, sum(lengths))
    packed = scheme.kind == "int4" or scheme.planes
    onnx_type = TensorProto.INT4 if packed else TensorProto.INT8
    grouping = {"axis": 0, "block_size": scheme.group_size} if scheme.group_size else {"axis": 1}
    parts_of_sum = [("low", tensors.weight, tensors.scale)]
    if tensors.high_weight is not None:
        parts_of_sum.append(("high", tensors.high_weight, tensors.scale * np.float32(HIGH_PLANE)))
    nodes, constants = [], []
    for name, weight, scale in parts_of_sum:
        nodes.append(
            helper.make_node("DequantizeLinear", [name, f"{name}.s"], [f"{name}.y"], **grouping)
        )
        constants.append(helper.make_tensor(name, onnx_type, shape, weight.tobytes(), raw=True))
        constants.append(onnx.numpy_helper.from_array(scale, f"{name}.s"))
    nodes.append(helper.make_node("Sum", [f"{name}.y" for name, *_ in parts_of_sum], ["y"]))
    graph = helper.make_graph(
        nodes,
        "dequantize",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (computed,) = session.run(None, {})
    whole = np.concatenate([part.astype(np.float32) for part in parts])
    meant = dequantize_rows(quantize_rows(whole, scheme, "mse", FP16))
    np.testing.assert_array_equal(computed, meant.T)
    assert np.abs(computed - whole.T).mean() < 0.01  # of weights of size 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_damaged_weight_is_named(scheme: TensorScheme, bad: float):
    parts = make_parts([4, 6], 64)
    parts[1][5, 63] = bad
    with pytest.raises(CheckpointError, match=r"part1\.weight holds NaN or infinite .*again"):
        convert(parts, scheme)


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_a_weight_beyond_fp16_is_named_and_fits_bf16(kind: SchemeKind):
    """Quantized or not: the graph multiplies integer and scale in fp16."""
    scheme = TensorScheme(kind=kind, group_size=0 if kind == "float" else 32)
    parts = make_parts([4, 6], 64)
    parts[0][1, 2] = -1e5  # -99840 in bfloat16
    with pytest.raises(CheckpointError, match=r"part0\.weight .* 9\.984e\+04, .*--dtype bf16"):
        convert(parts, scheme)
    tensors, _ = convert(parts, scheme, float_type=BF16)
    if tensors.scale is None:
        stored = float(tensors.weight[2, 1])
    elif kind == "int8":
        stored = float(tensors.weight[2, 1]) * float(tensors.scale[0, 1])
    else:
        packed = tensors.weight.reshape(-1).view(np.uint8)
        integers = unpack_int4(packed, (64, 10))
        stored = float(integers[2, 1]) * float(tensors.scale[0, 1])
    assert stored == pytest.approx(-1e5, rel=0.08)
