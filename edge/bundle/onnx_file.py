"""Edits a small ONNX model file (weights external) in Python, without the ``onnx`` package.

The runtime needs three things of a graph: to see its inputs and outputs before an engine parses
it, to give the cache another capacity, and to rewrite attention for the CPU. The check of
TensorRT's rules also reads attributes and constants (`onnx_values`). Protocol Buffers' wire format
(https://protobuf.dev/programming-guides/encoding) is simple enough for that: a message is a list
of ``(field, wire type, value)``. Fields that are not edited stay as they were, byte for byte.
Field numbers are those of ``onnx.proto3``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import BundleError

_MAX_FIELDS = 1 << 18  # fields of a message; a decoder of 126 layers has 10,000 nodes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1  # a TensorProto's data_location
_INT64, _TYPE_FLOAT, _TYPE_INT, _TYPE_STRING, _TYPE_INTS = 7, 1, 2, 3, 7
_ELEMENTS = (
    "fp32 uint8 int8 uint16 int16 int32 int64 string bool fp16 fp64 uint32 uint64 complex64 "
    "complex128 bf16 fp8 fp8-e4m3fnuz fp8-e5m2 fp8-e5m2fnuz uint4 int4 fp4"
)
ELEMENT_TYPES = dict(enumerate(_ELEMENTS.split(), 1))
"""Names of ``TensorProto.DataType``; ``fp8`` is E4M3FN and ``fp4`` E2M1, as TensorRT has them."""
ELEMENT_NUMBERS = {name: number for number, name in ELEMENT_TYPES.items()}
# Versions of the small models that the runtime writes itself. From opset 16 on ONNX Runtime CUDA
# warns about every ScatterND; IR version 8 goes with ONNX 1.11.
_IR_VERSION, _OPSET = 8, 13
_NEW_IR_VERSION = 10  # the version of ONNX 1.16, the first with INT4

Value = int | bytes


@dataclass
class Message:
    """One protobuf message: its fields in file order."""

    fields: list[tuple[int, int, Value]] = field(default_factory=list)

    @staticmethod
    def parse(data: bytes) -> Message:
        """Decode one message; nested ones stay bytes.

        Raises:
            BundleError: the bytes are not a protobuf message.
        """
        fields: list[tuple[int, int, Value]] = []
        at = 0
        while at < len(data):
            key, at = read_varint(data, at)
            number, wire_type = key >> 3, key & 7
            if number == 0:
                raise BundleError(f"not an ONNX file: field number 0 before byte {at}")
            value: Value
            if wire_type == _VARINT:
                value, at = read_varint(data, at)
            else:
                if wire_type == _BYTES:
                    length, at = read_varint(data, at)
                elif wire_type in (_FIXED32, _FIXED64):
                    length = 4 if wire_type == _FIXED32 else 8
                else:
                    raise BundleError(f"not an ONNX file: wire type {wire_type} at byte {at}")
                value, at = data[at : at + length], at + length
                if at > len(data):
                    raise BundleError(f"not an ONNX file: it ends inside field {number}")
            fields.append((number, wire_type, value))
            if len(fields) > _MAX_FIELDS:
                raise BundleError(f"not an ONNX file: over {_MAX_FIELDS} fields in a part")
        return Message(fields)

    def serialize(self) -> bytes:
        """Encode the message; numbers in their shortest form give the bytes that `parse` read."""
        out = bytearray()
        for number, wire_type, value in self.fields:
            _write_varint(out, number << 3 | wire_type)
            if isinstance(value, int):
                _write_varint(out, value)
            else:
                if wire_type == _BYTES:
                    _write_varint(out, len(value))
                out += value
        return bytes(out)

    def all_bytes(self, number: int) -> list[bytes]:
        """Return every occurrence of a length-delimited field."""
        return [value for n, _, value in self.fields if n == number and isinstance(value, bytes)]

    def text(self, number: int) -> str:
        """Return the last occurrence of a string field, or an empty string."""
        values = self.all_bytes(number)
        return _text(values[-1]) if values else ""

    def integer(self, number: int) -> int:
        """Return the last occurrence of a varint field, or 0."""
        values = [value for n, _, value in self.fields if n == number and isinstance(value, int)]
        return values[-1] if values else 0

    def child(self, number: int) -> Message:
        """Return the last occurrence of a message field; empty if absent."""
        values = self.all_bytes(number)
        return Message.parse(values[-1]) if values else Message()

    def add(self, number: int, value: int | bytes | str | Message) -> Message:
        """Append a field; returns self."""
        if isinstance(value, int):
            self.fields.append((number, _VARINT, value))
            return self
        if isinstance(value, Message):
            value = value.serialize()
        data = value.encode() if isinstance(value, str) else value
        self.fields.append((number, _BYTES, data))
        return self

    def replace(self, number: int, values: Iterable[bytes]) -> None:
        """Replace the first occurrence of a length-delimited field by ``values``."""
        places = [i for i, entry in enumerate(self.fields) if entry[0] == number]
        at = places[0] if places else len(self.fields)
        kept = [entry for entry in self.fields if entry[0] != number]
        self.fields = kept[:at] + [(number, _BYTES, value) for value in values] + kept[at:]


@dataclass
class Node:
    """A node of the graph; attributes, and fields that are not edited here, stay encoded."""

    op_type: str
    inputs: list[str]
    outputs: list[str]
    name: str = ""
    domain: str = ""
    attributes: list[bytes] = field(default_factory=list)
    other_fields: list[tuple[int, int, Value]] = field(default_factory=list)

    @staticmethod
    def decode(data: bytes) -> Node:
        """Decode a NodeProto."""
        message = Message.parse(data)
        return Node(
            message.text(4),
            [_text(value) for value in message.all_bytes(1)],
            [_text(value) for value in message.all_bytes(2)],
            message.text(3),
            message.text(7),
            message.all_bytes(5),
            [entry for entry in message.fields if entry[0] not in (1, 2, 3, 4, 5, 7)],
        )

    def encode(self) -> bytes:
        """Encode as a NodeProto."""
        message = Message()
        for value in self.inputs:
            message.add(1, value)
        for value in self.outputs:
            message.add(2, value)
        if self.name:
            message.add(3, self.name)
        message.add(4, self.op_type)
        for attribute in self.attributes:
            message.add(5, attribute)
        if self.domain:
            message.add(7, self.domain)
        message.fields += self.other_fields
        return message.serialize()


@dataclass(frozen=True)
class ValueInfo:
    """Name, element type (in `ELEMENT_TYPES`) and dimensions (a string is dynamic)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ExternalTensor:
    """Where an initializer's bytes are.

    Attributes:
        dtype: element type (in `ELEMENT_TYPES`).
        shape: its dimensions.
        file: name of the data file, relative to the model.
        offset, num_bytes: its bytes in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int

    def read(self, directory: Path) -> NDArray[Any]:
        """Read its values, of a type that NumPy has, from the file in a directory."""
        with (directory / self.file).open("rb") as file:
            file.seek(self.offset)
            dtype = self.dtype.replace("fp", "float")
            return np.frombuffer(file.read(self.num_bytes), dtype).reshape(self.shape)


class OnnxFile:
    """A model to inspect and edit.

    Attributes:
        nodes: the nodes in topological order; edit the list or its nodes, then `serialize`.
        proto: all else of the graph, a GraphProto.
        in_memory: values of the initializers that `put_in_memory` took out of their files.
    """

    def __init__(self, data: bytes) -> None:
        self._model = Message.parse(data)
        self.proto = self._model.child(7)
        if not self.proto.fields:
            raise BundleError("not an ONNX file: it has no graph")
        self.nodes = [Node.decode(value) for value in self.proto.all_bytes(1)]
        self.in_memory: dict[str, NDArray[np.generic]] = {}

    @property
    def inputs(self) -> list[ValueInfo]:
        """Return the graph's inputs in order."""
        return [_value_info(value) for value in self.proto.all_bytes(11)]

    @property
    def outputs(self) -> list[ValueInfo]:
        """Return the graph's outputs in order."""
        return [_value_info(value) for value in self.proto.all_bytes(12)]

    @property
    def opsets(self) -> dict[str, int]:
        """Return the version of each operator domain of the model; ``""`` is ONNX's own."""
        declared = [Message.parse(data) for data in self._model.all_bytes(8)]
        return {
            "" if each.text(1) == "ai.onnx" else each.text(1): each.integer(2) for each in declared
        }

    @property
    def initializers(self) -> list[bytes]:
        """Return the graph's constants, each an encoded TensorProto (`edge.bundle.onnx_values`)."""
        return self.proto.all_bytes(5)

    def serialize(self, first: str = "") -> bytes:
        """Encode the edited model, without nodes and initializers that nothing uses.

        Args:
            first: name of a tensor. Nodes that read it are moved before all others, even before
                those whose outputs they read. ONNX has no such order; ONNX Runtime takes any.
        """
        self.prune()
        # An optional input that is absent has the empty name.
        nodes = sorted(self.nodes, key=lambda node: not first or first not in node.inputs)
        self.proto.replace(1, (node.encode() for node in nodes))
        self._model.replace(7, [self.proto.serialize()])
        return self._model.serialize()

    def set_dimension(self, names: Iterable[str], axis: int, size: int) -> None:
        """Give a dimension of some inputs or outputs another static size.

        Raises:
            BundleError: one of them has no such axis.
        """
        wanted = set(names)
        for number in (11, 12):
            infos = [
                _with_dimension(data, axis, size) if Message.parse(data).text(1) in wanted else data
                for data in self.proto.all_bytes(number)
            ]
            self.proto.replace(number, infos)

    def add_int64(self, name: str, values: Sequence[int]) -> str:
        """Add a one-dimensional int64 constant."""
        raw = struct.pack(f"<{len(values)}q", *values)
        tensor = Message().add(1, len(values)).add(2, _INT64).add(8, name).add(9, raw)
        self.proto.add(5, tensor)
        return name

    def remove_values(self, names: Iterable[str]) -> None:
        """Remove inputs and outputs of these names from the graph, if there are any."""
        unwanted = set(names)
        for number in (11, 12):
            infos = self.proto.all_bytes(number)
            kept = [data for data in infos if Message.parse(data).text(1) not in unwanted]
            self.proto.replace(number, kept)

    def use_domain(self, domain: str, version: int) -> None:
        """Declare an operator domain."""
        self._model.add(8, Message().add(1, domain).add(2, version))

    def external_tensors(self) -> dict[str, ExternalTensor]:
        """Every initializer that is stored outside the model, by name.

        Raises:
            BundleError: one of them does not say where its bytes are.
        """
        tensors = map(Message.parse, self.proto.all_bytes(5))
        return {each.text(8): _external(each) for each in tensors if each.integer(14) == _EXTERNAL}

    def put_in_memory(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Set values of initializers, old or new, that are kept in no file.

        The model says that they are external, each in a file of its own name. Code that opens a
        session on it must pass `in_memory` to the session, or write those files.
        """
        tensors = self.proto.all_bytes(5)
        kept = [data for data in tensors if Message.parse(data).text(8) not in values]
        new = []
        for name, value in values.items():
            place = (name, 0, value.nbytes)
            element = value.dtype.name.replace("float", "fp")
            new.append(tensor_elsewhere(name, element, value.shape, place).serialize())
        self.proto.replace(5, kept + new)
        self.in_memory.update(values)

    def prune(self) -> None:
        """Drop nodes and weights that no output needs."""
        needed = {info.name for info in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        tensors = self.proto.all_bytes(5)
        self.proto.replace(5, [data for data in tensors if Message.parse(data).text(8) in needed])


def attribute(name: str, value: int | float | str | Sequence[int]) -> bytes:
    """Encode an AttributeProto: an int, a float, a string, or ints."""
    message = Message().add(1, name)
    if isinstance(value, str):
        message.add(4, value).add(20, _TYPE_STRING)
    elif isinstance(value, int):
        message.add(3, value).add(20, _TYPE_INT)
    elif isinstance(value, float):
        message.fields.append((2, _FIXED32, struct.pack("<f", value)))
        message.add(20, _TYPE_FLOAT)
    else:
        for item in value:
            message.add(8, item)
        message.add(20, _TYPE_INTS)
    return message.serialize()


def _external(tensor: Message) -> ExternalTensor:
    entries = [Message.parse(entry) for entry in tensor.all_bytes(13)]
    where = {entry.text(1): entry.text(2) for entry in entries}
    try:
        place = where["location"], int(where["offset"]), int(where["length"])
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"the graph does not say where {tensor.text(8)!r} is stored ({where}); "
            "export the bundle again"
        ) from error
    dims = tuple(value for n, _, value in tensor.fields if n == 1 and isinstance(value, int))
    element = tensor.integer(2)
    return ExternalTensor(ELEMENT_TYPES.get(element, f"onnx type {element}"), dims, *place)


def _value_info(data: bytes) -> ValueInfo:
    message = Message.parse(data)
    tensor = message.child(2).child(1)
    dims: list[int | str] = []
    for dim in tensor.child(2).all_bytes(1):
        parsed = Message.parse(dim)
        dims.append(parsed.text(2) or parsed.integer(1))
    element = tensor.integer(1)
    return ValueInfo(
        message.text(1), ELEMENT_TYPES.get(element, f"onnx type {element}"), tuple(dims)
    )


def _with_dimension(data: bytes, axis: int, size: int) -> bytes:
    info = Message.parse(data)
    kind = info.child(2)
    tensor = kind.child(1)
    shape = tensor.child(2)
    dims = shape.all_bytes(1)
    if not 0 <= axis < len(dims):
        raise BundleError(
            f"the graph's {info.text(1)} has {len(dims)} dimensions, none with the index {axis}; "
            "export the bundle again"
        )
    dims[axis] = Message().add(1, size).serialize()
    shape.replace(1, dims)
    tensor.replace(2, [shape.serialize()])
    kind.replace(1, [tensor.serialize()])
    info.replace(2, [kind.serialize()])
    return info.serialize()


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"not an ONNX file: a name is not UTF-8 ({error})") from error


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a byte, and the offset after it.

    Raises:
        BundleError: the number does not end, or exceeds 64 bits.
    """
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BundleError(f"not an ONNX file: a number at byte {at} does not end")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if result >> 64:
                raise BundleError(f"not an ONNX file: the number before byte {at} exceeds 64 bits")
            return result, at
        shift += 7


def _write_varint(out: bytearray, value: int) -> None:
    value &= (1 << 64) - 1  # protobuf writes a negative int64 in ten bytes
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def small_model(
    nodes: Sequence[Node],
    inputs: Sequence[Message],
    outputs: Sequence[Message],
    constants: dict[str, int] | None = None,
    weights: Sequence[Message] = (),
    opset: int = _OPSET,
) -> bytes:
    """Encode a ModelProto; fields are those of ``onnx.proto3``.

    Args:
        nodes: the graph's nodes.
        inputs: its inputs, each a ValueInfoProto.
        outputs: its outputs, each a ValueInfoProto.
        constants: int64 constants of one number.
        weights: further initializers, each a TensorProto.
        opset: version of the operators.
    """
    graph = Message()
    for node in nodes:
        graph.add(1, node.encode())
    graph.add(2, "rows")
    for name, value in (constants or {}).items():
        raw = struct.pack("<q", value)
        graph.add(5, Message().add(1, 1).add(2, ELEMENT_NUMBERS["int64"]).add(8, name).add(9, raw))
    for number, values in ((5, weights), (11, inputs), (12, outputs)):
        for info in values:
            graph.add(number, info)
    model = Message().add(1, _IR_VERSION if opset == _OPSET else _NEW_IR_VERSION).add(7, graph)
    return model.add(8, Message().add(1, "").add(2, opset)).serialize()


def tensor_info(name: str, element: int, shape: Sequence[int | str]) -> Message:
    """Make a ValueInfoProto of a tensor; a string is a dynamic dimension."""
    dims = Message()
    for size in shape:
        dims.add(1, Message().add(2 if isinstance(size, str) else 1, size))
    tensor = Message().add(1, element).add(2, dims)
    return Message().add(1, name).add(2, Message().add(1, tensor))


def tensor_elsewhere(
    name: str, dtype: str, shape: Sequence[int], place: tuple[str, int, int]
) -> Message:
    """Make a TensorProto whose bytes are in a file: its name, the first byte, and their number."""
    tensor = Message()
    for size in shape:
        tensor.add(1, size)
    tensor.add(2, ELEMENT_NUMBERS[dtype]).add(8, name)
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        tensor.add(13, Message().add(1, key).add(2, str(value)))
    return tensor.add(14, _EXTERNAL)
