"""Reads constants and attributes of an ONNX graph as plain values, without the ``onnx`` package.

Nothing is trusted: a type, size or offset that does not fit the file is a `BundleError`. Weights
stay in their file; `Constants.values` reads only those that it is asked for.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge.errors import BundleError

from .manifest import is_file_name
from .onnx_file import ELEMENT_TYPES, Message, Node, OnnxFile, read_varint

ELEMENT_BITS = {
    name: bits
    for bits, names in (
        (4, "int4 uint4 fp4"),
        (8, "bool int8 uint8 fp8 fp8-e4m3fnuz fp8-e5m2 fp8-e5m2fnuz"),
        (16, "int16 uint16 fp16 bf16"),
        (32, "int32 uint32 fp32"),
        (64, "int64 uint64 fp64"),
    )
    for name in names.split()
}
"""Maps each element type to NumPy's type of its packed elements."""
_NUMPY = {
    name: f"<{code}{ELEMENT_BITS[name] // 8}"
    for code, names in (
        ("i", "int8 int16 int32 int64"),
        ("u", "bool uint8 uint16 uint32 uint64 bf16"),
        ("f", "fp16 fp32 fp64"),
    )
    for name in names.split()
}
# A tensor without raw bytes has its numbers in the field of its type; all others use int32_data.
_TYPED_FIELDS = {"fp32": 4, "fp64": 10, "int64": 7, "uint32": 11, "uint64": 11}
_INT32_DATA, _RAW, _EXTERNAL_DATA, _DATA_LOCATION = 5, 9, 13, 14
_MAX_RANK = 16
_TYPE_FLOAT, _TYPE_INT, _TYPE_STRING, _TYPE_TENSOR, _TYPE_FLOATS, _TYPE_INTS = 1, 2, 3, 4, 6, 7


@dataclass(frozen=True)
class Constant:
    """A tensor whose values are in a file.

    Attributes:
        name: name of the tensor.
        dtype: element type (in `edge.bundle.onnx_file.ELEMENT_TYPES`).
        shape: its dimensions; empty is a scalar.
        raw: its bytes, packed; None if another file has them.
        location: name of that file, beside the graph's; None if there is none.
        offset: offset of the first byte in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes | None
    location: str | None = None
    offset: int = 0

    @property
    def volume(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all elements, packed."""
        return (self.volume * ELEMENT_BITS[self.dtype] + 7) // 8


class Constants:
    """The constants of a graph by name: initializers, and the values of ``Constant`` nodes.

    Args:
        graph: the graph.
        directory: directory of the graph's file and of the files of external values.

    Raises:
        BundleError: a constant is not a valid tensor, or a name comes twice.
    """

    def __init__(self, graph: OnnxFile, directory: Path | None = None) -> None:
        self._directory = directory
        self._by_name: dict[str, Constant] = {}
        for data in graph.initializers:
            self._add(read_constant(data))
        self.initializers = frozenset(self._by_name)
        """Names of the constants that are not values of nodes."""
        for node in graph.nodes:
            constant = _constant_node(node)
            if constant is not None:
                self._add(constant)

    def _add(self, constant: Constant) -> None:
        if constant.name in self._by_name:
            raise BundleError(f"not a valid graph: two constants are named {constant.name!r}")
        self._by_name[constant.name] = constant

    def get(self, name: str) -> Constant | None:
        """Return the constant of a name; None if a node or the caller makes the tensor."""
        return self._by_name.get(name)

    def values(self, name: str) -> npt.NDArray[Any] | None:
        """Return all values of a constant as a flat array; bf16 as float32.

        Returns:
            None for types of less than 8 bits and FP8, and for values in another file if no
            directory was given.

        Raises:
            BundleError: there is no such constant, or its file is missing or too short.
        """
        constant = self._by_name.get(name)
        if constant is None:
            raise BundleError(f"not a valid graph: there is no constant {name!r}")
        if constant.dtype not in _NUMPY:
            return None
        data = constant.raw
        if data is None:
            if self._directory is None:
                return None
            data = _read_external(self._directory, constant)
        array = np.frombuffer(data, _NUMPY[constant.dtype])
        if constant.dtype == "bf16":
            return (array.astype("<u4") << 16).view("<f4")
        return array


def node_attributes(node: Node) -> dict[str, Any]:
    """Return the attributes of a node: int, float, str, tuple of ints or floats, or `Constant`.

    Other kinds (graphs, lists of strings) are None, so that their presence shows.

    Raises:
        BundleError: one of them is not a valid AttributeProto.
    """
    found = {}
    for data in node.attributes:
        message = Message.parse(data)
        found[message.text(1)] = _attribute_value(message)
    return found


def read_constant(data: bytes) -> Constant:
    """Read a TensorProto.

    Raises:
        BundleError: the element type is unknown, a size is below 0, there are more or fewer values
            than the shape says, or the location is not a plain file name.
    """
    message = Message.parse(data)
    name, element = message.text(8), message.integer(2)
    where = f"not a valid graph: the constant {name!r}"
    dtype = ELEMENT_TYPES.get(element)
    if dtype is None or dtype not in ELEMENT_BITS:
        raise BundleError(f"{where} has element type {element}, which is none of numbers")
    shape = tuple(_signed(size) for size in _varints(message, 1))
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
        raise BundleError(f"{where} has the shape {list(shape)[:_MAX_RANK]}")
    if message.integer(_DATA_LOCATION) == 1:
        return _external(message, name, dtype, shape)
    raws = message.all_bytes(_RAW)
    constant = Constant(name, dtype, shape, raws[-1] if raws else _typed_values(message, dtype))
    assert constant.raw is not None
    if len(constant.raw) != constant.num_bytes:
        raise BundleError(
            f"{where} has {len(constant.raw)} bytes, its shape {list(shape)} of {dtype} takes "
            f"{constant.num_bytes}"
        )
    return constant


def _constant_node(node: Node) -> Constant | None:
    if node.op_type != "Constant" or node.domain or len(node.outputs) != 1:
        return None
    given = (
        _constant_of(node.outputs[0], name, value) for name, value in node_attributes(node).items()
    )
    return next((constant for constant in given if constant is not None), None)


def _constant_of(output: str, name: str, value: Any) -> Constant | None:
    """Return the value of a ``Constant`` node's attribute; None for strings and sparse tensors."""
    if name == "value" and isinstance(value, Constant):
        return Constant(output, value.dtype, value.shape, value.raw, value.location, value.offset)
    kind: type
    if name in ("value_int", "value_ints"):
        code, dtype, kind = "q", "int64", int
    elif name in ("value_float", "value_floats"):
        code, dtype, kind = "f", "fp32", float
    else:
        return None
    if isinstance(value, kind):
        return Constant(output, dtype, (), struct.pack(f"<{code}", value))
    if isinstance(value, tuple) and all(isinstance(each, kind) for each in value):
        raw = struct.pack(f"<{len(value)}{code}", *value)
        return Constant(output, dtype, (len(value),), raw)
    return None


def _external(message: Message, name: str, dtype: str, shape: tuple[int, ...]) -> Constant:
    entries = [Message.parse(data) for data in message.all_bytes(_EXTERNAL_DATA)]
    facts = {entry.text(1): entry.text(2) for entry in entries}
    where = f"not a valid graph: the constant {name!r}"
    location = facts.get("location", "")
    if not is_file_name(location):
        raise BundleError(f"{where} is in {location!r}, which is no file of a bundle")
    try:
        offset = int(facts.get("offset") or "0")
    except ValueError:
        offset = -1
    constant = Constant(name, dtype, shape, None, location, offset)
    length = facts.get("length")
    if offset < 0 or (length and length != str(constant.num_bytes)):
        raise BundleError(
            f"{where} is at offset {facts.get('offset')} of {location} with {length} bytes; "
            f"its shape {list(shape)} of {dtype} takes {constant.num_bytes}"
        )
    return constant


def _read_external(directory: Path, constant: Constant) -> bytes:
    assert constant.location is not None
    path = directory / constant.location
    try:
        # The size comes first, so that no size in a file makes this allocate that much memory.
        if path.stat().st_size < constant.offset + constant.num_bytes:
            raise BundleError(
                f"{path} is too short: the constant {constant.name!r} has {constant.num_bytes} "
                f"bytes at {constant.offset}; copy or export the bundle again"
            )
        with path.open("rb") as file:
            file.seek(constant.offset)
            return file.read(constant.num_bytes)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror}); copy or export the bundle again"
        ) from error


def _typed_values(message: Message, dtype: str) -> bytes:
    """Return the bytes of a tensor that stores its numbers one by one."""
    number = _TYPED_FIELDS.get(dtype, _INT32_DATA)
    if dtype in ("fp32", "fp64"):  # the same bytes in the file, packed or not
        return b"".join(message.all_bytes(number))
    values = [value & 0xFFFFFFFFFFFFFFFF for value in _varints(message, number)]
    if ELEMENT_BITS[dtype] == 4:  # each entry has two elements
        return bytes(value & 0xFF for value in values)
    size = ELEMENT_BITS[dtype] // 8
    mask = (1 << 8 * size) - 1
    return b"".join((value & mask).to_bytes(size, "little") for value in values)


def _attribute_value(message: Message) -> Any:
    kind = message.integer(20) or _guess_type(message)
    if kind == _TYPE_INT:
        return _signed(message.integer(3))
    if kind == _TYPE_STRING:
        values = message.all_bytes(4)
        return values[-1].decode("utf-8", "replace") if values else ""
    if kind == _TYPE_TENSOR:
        tensors = message.all_bytes(5)
        return read_constant(tensors[-1]) if tensors else None
    if kind == _TYPE_INTS:
        return tuple(_signed(value) for value in _varints(message, 8))
    if kind in (_TYPE_FLOAT, _TYPE_FLOATS):
        data = b"".join(message.all_bytes(2 if kind == _TYPE_FLOAT else 7))
        if len(data) % 4:
            raise BundleError(
                f"not an ONNX file: attribute {message.text(1)!r} has {len(data)} bytes of floats"
            )
        floats = struct.unpack(f"<{len(data) // 4}f", data)
        if kind == _TYPE_FLOATS:
            return floats
        return floats[-1] if floats else 0.0
    return None


def _guess_type(message: Message) -> int:
    """Guess the type of an attribute that states none, from the field that is there."""
    by_field = {2: _TYPE_FLOAT, 3: _TYPE_INT, 4: _TYPE_STRING, 5: _TYPE_TENSOR}
    by_field.update({7: _TYPE_FLOATS, 8: _TYPE_INTS})
    return next((by_field[n] for n, _, _ in message.fields if n in by_field), 0)


def _varints(message: Message, number: int) -> list[int]:
    """Return a repeated integer field, packed or not."""
    found: list[int] = []
    for n, _, value in message.fields:
        if n == number:
            found += [value] if isinstance(value, int) else _unpack(value)
    return found


def _unpack(data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = read_varint(data, at)
        found.append(value)
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
