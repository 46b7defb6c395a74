"""The small ONNX reader and editor against the ``onnx`` package."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle.onnx_file import ELEMENT_TYPES, ExternalTensor, Message, Node, OnnxFile, attribute
from edge.errors import BundleError
from tests.conftest import Bundles
from tests.makers.tiny_models import KINDS, Kind

onnx = pytest.importorskip("onnx", reason="the reference")
helper, TensorProto = onnx.helper, onnx.TensorProto

SLOW = settings(max_examples=100, deadline=None)
int64s = st.integers(-(2**63), 2**63 - 1)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
floats = st.floats(width=32, allow_nan=False)

# Fields of any number that a newer ONNX might bring, and what `Message` makes of them.
unknown_fields = st.lists(
    st.tuples(st.integers(1000, 2**29 - 1), st.just(0), st.integers(0, 2**64 - 1))
    | st.tuples(st.integers(1000, 2**29 - 1), st.just(1), st.binary(min_size=8, max_size=8))
    | st.tuples(st.integers(1000, 2**29 - 1), st.just(2), st.binary(max_size=20))
    | st.tuples(st.integers(1000, 2**29 - 1), st.just(5), st.binary(min_size=4, max_size=4)),
    max_size=4,
)


@st.composite
def attributes(draw: st.DrawFn) -> Any:
    value = draw(
        int64s
        | floats
        | names
        | st.lists(int64s, min_size=1, max_size=4)
        | st.lists(floats, min_size=1, max_size=4)
        | st.lists(names, min_size=1, max_size=3)
    )
    return helper.make_attribute(draw(names), value)


@st.composite
def nodes(draw: st.DrawFn) -> Any:
    node = helper.make_node(
        draw(names),
        draw(st.lists(names | st.just(""), max_size=3)),
        ["y", *draw(st.lists(names, max_size=2))],
        name=draw(st.none() | names),
        domain=draw(st.none() | names),
        doc_string=draw(st.none() | names),
    )
    node.attribute.extend(draw(st.lists(attributes(), max_size=3)))
    for key, value in draw(st.dictionaries(names, names, max_size=2)).items():
        node.metadata_props.add(key=key, value=value)
    return with_unknown(node, draw(unknown_fields))


@st.composite
def models(draw: st.DrawFn) -> Any:
    """A model whose every node is needed; not one that makes sense."""
    tensors = [
        helper.make_tensor(
            "y", TensorProto.INT64, [2], draw(st.lists(int64s, min_size=2, max_size=2))
        ),
        helper.make_tensor("y", TensorProto.FLOAT, [1], [draw(floats)]),
        helper.make_tensor("y", TensorProto.FLOAT16, [1], b"ab", raw=True),
    ]
    graph = helper.make_graph(
        draw(st.lists(nodes(), max_size=3)),
        draw(names),
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", draw(int64s), None])],
        [helper.make_tensor_value_info("y", TensorProto.INT4, [])],
        draw(st.lists(st.sampled_from(tensors), max_size=3)),
        doc_string=draw(names),
    )
    model = helper.make_model(
        graph, producer_name=draw(names), ir_version=draw(st.integers(0, 2**63 - 1))
    )
    helper.set_model_props(model, draw(st.dictionaries(names, names, max_size=2)))
    return with_unknown(model, draw(unknown_fields))


def with_unknown(message: Any, fields: list[tuple[int, int, Any]]) -> Any:
    message.MergeFromString(Message(list(fields)).serialize())
    return message


@SLOW
@given(models())
def test_messages_survive_byte_for_byte(model: Any):
    data = model.SerializeToString()
    message = Message.parse(data)
    assert message.serialize() == data
    graph = message.child(7)
    assert graph.serialize() == model.graph.SerializeToString()
    for encoded in graph.all_bytes(1):
        assert Message.parse(encoded).serialize() == encoded


@SLOW
@given(models())
def test_a_model_that_nobody_edits_stays_the_same_model(model: Any):
    data = model.SerializeToString()
    assert onnx.load_from_string(OnnxFile(data).serialize()) == onnx.load_from_string(data)


@SLOW
@given(unknown_fields)
def test_unknown_fields_are_read_as_they_were_written(fields: list[tuple[int, int, Any]]):
    data = Message(list(fields)).serialize()
    assert Message.parse(data).fields == fields
    reference = onnx.ModelProto.FromString(data)
    assert reference.SerializeToString() == data  # so protobuf, too, takes all of them as fields


@SLOW
@given(nodes())
def test_nodes_are_what_onnx_says(proto: Any):
    node = Node.decode(proto.SerializeToString())
    assert node.op_type == proto.op_type
    assert node.inputs == list(proto.input)
    assert node.outputs == list(proto.output)
    assert (node.name, node.domain) == (proto.name, proto.domain)
    assert onnx.NodeProto.FromString(node.encode()) == proto


@SLOW
@given(names, int64s | floats | st.lists(int64s, min_size=1, max_size=5))
def test_attributes_are_what_onnx_makes(name: str, value: Any):
    assert onnx.AttributeProto.FromString(attribute(name, value)) == helper.make_attribute(
        name, value
    )


@SLOW
@given(st.integers(1, 2**29 - 1), int64s)
def test_negative_numbers_take_ten_bytes(number: int, value: int):
    data = Message().add(number, value).serialize()
    (found,) = Message.parse(data).fields
    assert struct.pack("<Q", found[2]) == struct.pack("<q", value)
    assert Message.parse(data).serialize() == data


def small_model(shape: tuple[int | str | None, ...] = ("batch", 2, 8, 4)) -> Any:
    """y = Relu(x) + c, beside two nodes and a constant that nothing uses."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["r"], name="relu"),
            helper.make_node("Neg", ["r"], ["dead.1"], name="neg"),
            helper.make_node("Add", ["dead.1", "unused"], ["dead.2"], name="dead"),
            helper.make_node("Add", ["r", "c"], ["y"], name="add"),
        ],
        "g",
        [info("x", TensorProto.FLOAT, shape), info("other", TensorProto.FLOAT, shape)],
        [info("y", TensorProto.FLOAT, shape)],
        [
            onnx.numpy_helper.from_array(np.ones(1, np.float32), "c"),
            onnx.numpy_helper.from_array(np.ones(1, np.float32), "unused"),
        ],
    )
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def test_inputs_and_outputs():
    file = OnnxFile(small_model().SerializeToString())
    assert [(v.name, v.dtype, v.shape) for v in file.inputs] == [
        ("x", "fp32", ("batch", 2, 8, 4)),
        ("other", "fp32", ("batch", 2, 8, 4)),
    ]
    assert [v.name for v in file.outputs] == ["y"]


def test_unused_nodes_and_weights_are_left_out():
    model = small_model()
    pruned = onnx.load_from_string(OnnxFile(model.SerializeToString()).serialize())
    onnx.checker.check_model(pruned, full_check=True)
    assert [node.name for node in pruned.graph.node] == ["relu", "add"]
    assert [tensor.name for tensor in pruned.graph.initializer] == ["c"]
    assert pruned.graph.input == model.graph.input  # an unused input is still part of the contract
    assert pruned.graph.output == model.graph.output


def test_edited_nodes_and_constants_pass_the_checker():
    file = OnnxFile(small_model().SerializeToString())
    shape = file.add_int64("shape", [0, -1, 4])
    file.nodes.insert(-1, Node("Reshape", ["r", shape], ["z"], "reshape"))
    file.nodes[-1].inputs[0] = "z"
    file.use_domain("com.microsoft", 1)
    edited = onnx.load_from_string(file.serialize())
    onnx.checker.check_model(edited)
    assert [node.op_type for node in edited.graph.node] == ["Relu", "Reshape", "Add"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in edited.graph.initializer}
    assert constants["shape"].dtype == np.int64
    assert constants["shape"].tolist() == [0, -1, 4]
    assert [(o.domain, o.version) for o in edited.opset_import] == [("", 21), ("com.microsoft", 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_set_dimension_on_a_bundle_equals_onnx(kind: Kind, tiny_bundles: Bundles):
    """Every field but the dimensions stays as it was."""
    path = tiny_bundles(kind, "native") / "decoder.cpu.onnx"
    file = OnnxFile(path.read_bytes())
    expected = onnx.load(path, load_external_data=False)
    infos = [*expected.graph.input, *expected.graph.output]
    cache = [info for info in infos if "past" in info.name or "present" in info.name]
    assert len(cache) == 8
    for info in cache:
        info.type.tensor_type.shape.dim[2].dim_value = 77
    file.set_dimension([info.name for info in cache], 2, 77)
    assert onnx.load_from_string(file.serialize()) == expected


def test_a_dynamic_dimension_becomes_static():
    file = OnnxFile(small_model().SerializeToString())
    file.set_dimension(["x", "y", "absent"], 0, 3)
    assert [v.shape[0] for v in [*file.inputs, *file.outputs]] == [3, "batch", 3]


def test_an_axis_that_is_not_there_is_refused():
    file = OnnxFile(small_model((4,)).SerializeToString())
    for axis in (1, -1):
        with pytest.raises(BundleError, match="x has 1 dimensions"):
            file.set_dimension(["x"], axis, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no graph"),
        (b"\x08\x07", "no graph"),
        (b"\x80", "does not end"),
        (b"\x08" + b"\xff" * 11, "does not end"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "exceeds 64 bits"),
        (b"\x00\x01", "field number 0"),
        (b"\x3a\x05abc", "ends inside field 7"),
        (b"\x0d\x01", "ends inside field 1"),
        (b"\x0b", "wire type 3"),
        (b"\x3a\x05\x0a\x03\x22\x01\xff", "not UTF-8"),
    ],
)
def test_a_malformed_model_is_refused(data: bytes, message: str):
    with pytest.raises(BundleError, match=message):
        OnnxFile(data)


def exercise(data: bytes) -> None:
    file = OnnxFile(data)
    file.set_dimension([info.name for info in [*file.inputs, *file.outputs]], 1, 5)
    file.add_int64("n", [1])
    file.external_tensors()
    OnnxFile(file.serialize())


SMALL = small_model().SerializeToString()


def _flip(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


@settings(max_examples=500, deadline=None)
@given(
    st.binary(max_size=60)
    | st.integers(0, len(SMALL)).map(lambda n: SMALL[:n])
    | st.builds(_flip, st.just(SMALL), st.integers(0, len(SMALL) - 1), st.integers(0, 255))
)
def test_malformed_bytes_raise_nothing_but_bundle_errors(data: bytes):
    with suppress(BundleError):
        exercise(data)


def test_every_single_byte_of_a_small_model_may_be_wrong():
    for at in range(len(SMALL)):
        for value in (0x00, 0x7F, 0x80, 0xFF, SMALL[at] ^ 0x08):
            with suppress(BundleError):
                exercise(_flip(SMALL, at, value))


@pytest.mark.parametrize(("quant", "integers"), [("int4", "int4"), ("int8-w8a8", "int8")])
def test_external_tensors_are_those_that_onnx_reads(
    quant: str, integers: str, tiny_bundles: Bundles
):
    path = tiny_bundles("qwen2", "native", quant) / "decoder.onnx"
    expected = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {item.key: item.value for item in tensor.external_data}
            expected[tensor.name] = ExternalTensor(
                ELEMENT_TYPES[tensor.data_type],
                tuple(tensor.dims),
                place["location"],
                int(place["offset"]),
                int(place["length"]),
            )
    assert OnnxFile(path.read_bytes()).external_tensors() == expected
    assert {tensor.dtype for tensor in expected.values()} >= {"fp16", integers}


def external_model(place: dict[str, str]) -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.INT4, dims=(2, 6))
    weight.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        weight.external_data.add(key=key, value=value)
    info = helper.make_tensor_value_info
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "s")
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["y"])],
        "g",
        [],
        [info("y", TensorProto.FLOAT, (2, 6))],
        [weight, scale],
    )
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return bytes(model.SerializeToString())


def test_a_tensor_put_in_memory_is_read_from_there():
    """And from no file: the one that the model names holds another type."""
    ort = pytest.importorskip("onnxruntime")
    file = OnnxFile(external_model({"location": "w.data", "offset": "0", "length": "6"}))
    values = np.arange(-6, 6, dtype=np.int8).reshape(2, 6)
    file.put_in_memory({"w": values})
    data = file.serialize()
    assert file.external_tensors()["w"].dtype == "int8"
    options = ort.SessionOptions()
    held = [ort.OrtValue.ortvalue_from_numpy(array) for array in file.in_memory.values()]
    options.add_external_initializers(list(file.in_memory), held)
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == (values / 2).tolist()


@pytest.mark.parametrize(
    "place",
    [{}, {"location": "w.data", "offset": "0"}, {"location": "w", "offset": "", "length": "6"}],
)
def test_a_tensor_that_is_nowhere_is_refused(place: dict[str, str]):
    with pytest.raises(BundleError, match="does not say where 'w' is stored"):
        OnnxFile(external_model(place)).external_tensors()


def test_an_edited_model_computes_the_same():
    """The bytes that `serialize` writes are what an engine reads."""
    ort = pytest.importorskip("onnxruntime")
    x = np.linspace(-1, 1, 2 * 2 * 8 * 4, dtype=np.float32).reshape(2, 2, 8, 4)
    session = ort.InferenceSession(OnnxFile(SMALL).serialize(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x, "other": x})
    assert found.tolist() == (np.maximum(x, 0) + 1).tolist()
