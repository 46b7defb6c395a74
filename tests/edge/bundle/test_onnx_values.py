"""Constants and attributes against the ``onnx`` package, and hostile files."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.onnx_file import Message, Node, OnnxFile
from edge.bundle.onnx_values import Constant, Constants, node_attributes, read_constant
from edge.errors import BundleError
from tests.conftest import Bundles

onnx = pytest.importorskip("onnx", reason="the reference")
helper, TensorProto = onnx.helper, onnx.TensorProto

int64s = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
# What each type may hold: ONNX keeps small types in int32_data, others in a field of their own.
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "FLOAT": floats,
    "DOUBLE": st.floats(allow_nan=False, allow_infinity=False),
    "FLOAT16": st.floats(width=16, allow_nan=False, allow_infinity=False),
    "INT8": st.integers(-128, 127),
    "UINT8": st.integers(0, 255),
    "INT16": st.integers(-(2**15), 2**15 - 1),
    "INT32": st.integers(-(2**31), 2**31 - 1),
    "UINT32": st.integers(0, 2**32 - 1),
    "INT64": int64s,
    "UINT64": st.integers(0, 2**64 - 1),
    "BOOL": st.booleans(),
}


def graph_of(tensors: list[Any], nodes: list[Any] | None = None) -> OnnxFile:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes or [], "g", [info], [info], tensors)
    return OnnxFile(helper.make_model(graph).SerializeToString())


@given(st.data(), st.sampled_from(sorted(NUMBERS)), SHAPES, st.booleans())
def test_constants_have_the_values_that_onnx_reads(
    data: st.DataObject, name: str, shape: list[int], raw: bool
) -> None:
    volume = int(np.prod(shape))
    values = data.draw(st.lists(NUMBERS[name], min_size=volume, max_size=volume))
    proto = helper.make_tensor("c", getattr(TensorProto, name), shape, values)
    if raw:
        proto = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(proto), "c")
    constants = Constants(graph_of([proto]))
    constant = constants.get("c")
    assert constant is not None
    assert constant.shape == tuple(shape)
    found = constants.values("c")
    assert found is not None
    assert found.tolist() == onnx.numpy_helper.to_array(proto).ravel().tolist()


def test_types_that_numpy_does_not_have() -> None:
    bf16 = helper.make_tensor("b", TensorProto.BFLOAT16, [2], [1.5, -2.0])
    int4 = helper.make_tensor("i", TensorProto.INT4, [3], [1, -2, 3])
    constants = Constants(graph_of([bf16, int4]))
    found = constants.values("b")
    assert found is not None
    assert found.tolist() == [1.5, -2.0]
    assert constants.values("i") is None
    four = constants.get("i")
    assert four is not None
    assert (four.dtype, four.num_bytes, four.raw) == ("int4", 2, b"\xe1\x03")


@given(
    st.dictionaries(
        st.text("abc_", min_size=1, max_size=4),
        int64s
        | floats
        | st.text(max_size=4)
        | st.lists(int64s, min_size=1, max_size=4)
        | st.lists(floats, min_size=1, max_size=4),
        max_size=3,
    )
)
def test_attributes_are_read_as_onnx_reads_them(wanted: dict[str, Any]) -> None:
    proto = helper.make_node("Any", [], ["y"], **wanted)
    found = node_attributes(Node.decode(proto.SerializeToString()))
    expected = {each.name: helper.get_attribute_value(each) for each in proto.attribute}
    for name, value in expected.items():
        if isinstance(value, bytes):
            expected[name] = value.decode()
        elif isinstance(value, list):
            expected[name] = tuple(value)
    assert found == expected


def test_a_constant_node_is_a_constant() -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value_ints=[1, 2]),
        helper.make_node("Constant", [], ["b"], value_float=0.5),
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("", 1, [1], [3.0])),
        helper.make_node("Constant", [], ["d"], value_string="text"),
    ]
    constants = Constants(graph_of([], nodes))
    found = {name: constants.values(name) for name in "abc"}
    assert {name: value.tolist() for name, value in found.items() if value is not None} == {
        "a": [1, 2],
        "b": [0.5],
        "c": [3.0],
    }
    assert constants.get("d") is None


def test_opsets_of_every_domain() -> None:
    graph = helper.make_graph([], "g", [], [])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("ai.onnx", 21), helper.make_opsetid("own", 1)]
    )
    assert OnnxFile(model.SerializeToString()).opsets == {"": 21, "own": 1}


def external(location: str, offset: str, length: str, shape: tuple[int, ...] = (2,)) -> bytes:
    tensor = Message().add(2, TensorProto.FLOAT).add(8, "c").add(14, 1)
    for size in shape:
        tensor.add(1, size)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.add(13, Message().add(1, key).add(2, value))
    return tensor.serialize()


def test_external_values_are_read_from_beside_the_graph(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(b"\0" * 4 + np.array([1.0, 2.0], "<f4").tobytes())
    tensor = TensorProto.FromString(external("w.data", "4", "8"))
    constants = Constants(graph_of([tensor]), tmp_path)
    found = constants.values("c")
    assert found is not None
    assert found.tolist() == [1.0, 2.0]
    assert Constants(graph_of([tensor])).values("c") is None
    (tmp_path / "w.data").write_bytes(b"\0" * 11)
    with pytest.raises(BundleError, match="too short"):
        constants.values("c")
    (tmp_path / "w.data").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        constants.values("c")


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (external("../w.data", "0", "8"), "no file of a bundle"),
        (external("/etc/passwd", "0", "8"), "no file of a bundle"),
        (external("", "0", "8"), "no file of a bundle"),
        (external("w.data", "-4", "8"), "at offset -4"),
        (external("w.data", "x", "8"), "at offset x"),
        (external("w.data", "0", "9"), "with 9 bytes"),
        (external("w.data", "0", "8", (HUGE, HUGE)), "with 8 bytes"),
        (Message().add(2, 1).add(1, HUGE).add(8, "c").add(9, b"1234").serialize(), "4 bytes"),
        (Message().add(2, 1).add(1, -1).add(8, "c").add(9, b"1234").serialize(), "shape"),
        (Message().add(2, 99).add(8, "c").add(9, b"1234").serialize(), "element type 99"),
        (Message().add(2, 8).add(8, "c").add(6, b"text").serialize(), "element type 8"),
        (Message().add(2, 7).add(1, b"\x80").add(8, "c").serialize(), "does not end"),
    ],
)
def test_a_hostile_constant_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=re.escape(message)):
        read_constant(data)


def test_a_huge_external_constant_asks_for_no_memory(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(b"1234")
    tensor = TensorProto.FromString(external("w.data", "0", "", (HUGE,)))
    with pytest.raises(BundleError, match="too short"):
        Constants(graph_of([tensor]), tmp_path).values("c")


def test_two_constants_of_one_name_are_refused() -> None:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [], [1.0])
    with pytest.raises(BundleError, match="two constants are named 'c'"):
        Constants(graph_of([tensor, tensor]))


BASE = helper.make_model(
    helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value_ints=[1, 2]),
            helper.make_node("Cast", ["x"], ["y"], to=1, note="s", f=[1.0]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [
            helper.make_tensor("a", TensorProto.INT64, [2], [1, 2]),
            TensorProto.FromString(external("w.data", "0", "8")),
        ],
    )
).SerializeToString()


def _read_everything(data: bytes, directory: Path) -> None:
    graph = OnnxFile(data)
    assert all(isinstance(version, int) for version in graph.opsets.values())
    constants = Constants(graph, directory)
    for node in graph.nodes:
        node_attributes(node)
        for name in [*node.inputs, *node.outputs, "a", "c"]:
            constant = constants.get(name)
            assert constant is None or isinstance(constant, Constant)
            if constant is not None:
                constants.values(name)


@settings(max_examples=500, deadline=None)
@given(
    st.integers(0, len(BASE)).map(lambda n: BASE[:n])
    | st.builds(
        lambda at, value: BASE[:at] + value + BASE[at + len(value) :],
        st.integers(0, len(BASE) - 1),
        st.binary(min_size=1, max_size=10),
    )
    | st.builds(
        lambda at, value: BASE[:at] + value + BASE[at:],
        st.integers(0, len(BASE) - 1),
        st.binary(min_size=1, max_size=10),
    )
)
def test_a_damaged_file_raises_nothing_but_bundle_errors(data: bytes) -> None:
    with suppress(BundleError):
        _read_everything(data, Path("/nonexistent"))


def test_the_scales_of_a_bundle_are_read(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    reference = onnx.load(str(bundle / "decoder.onnx"))
    constants = Constants(graph, bundle)
    scales = [node.inputs[1] for node in graph.nodes if node.op_type == "DequantizeLinear"]
    assert scales
    for tensor in reference.graph.initializer:
        if tensor.name in scales:
            found = constants.values(tensor.name)
            assert found is not None
            assert found.tolist() == onnx.numpy_helper.to_array(tensor).ravel().tolist()
