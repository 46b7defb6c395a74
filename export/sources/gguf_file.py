"""Reads metadata and tensors of a ``.gguf`` file; every length is checked before it is used.

The parser is our own, because ``gguf.GGUFReader`` trusts the lengths in the file (a damaged one
makes it allocate without end) and needs seconds for a vocabulary. The package still dequantizes.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError, DependencyError, install_command
from edge.files import open_file

from .safetensors_file import bfloat16
from .weight_files import HEAD_BYTES, refuse_stand_in

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # GGML_MAX_DIMS
# Limits for the keys, values and names before the weights: a vocabulary of 150,000 tokens has 1
# million values in 8 MB. Each becomes a Python object.
_MAX_COUNT = 1 << 16
_MAX_VALUES = 1 << 21
_MAX_METADATA_BYTES = 1 << 26
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
    _BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_VIEWS = {"F32": "<f4", "F16": "<f2"}
# Removed types of ggml's enum ggml_type: two of 2023; the others are now rearranged at load.
_REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
# Dequantizing makes several temporaries of a chunk's size. The package takes 16 rows at a time, so
# short rows are joined to longer ones; otherwise its calls of NumPy take most of the time.
_CHUNK_WEIGHTS, _LONG_ROW = 1 << 22, 1 << 13


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type, shape in NumPy's order (rows first) and bytes in the file."""

    ggml_type: int
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class GgufFile:
    """One mapped file.

    Attributes:
        path: the file.
        metadata: key to number, string, bool or list of them.
        tensors: the tensors by GGUF name.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and parse everything but the weights.

        Raises:
            CheckpointError: the file cannot be read, is damaged or of an unknown version.
            DependencyError: the package gguf is not installed.
        """
        try:
            import gguf
        except ImportError as error:
            raise DependencyError(
                f"reading {path} needs gguf; run: {install_command('export')}"
            ) from error
        self._gguf = gguf
        self.path = path
        try:
            with open_file(path) as file:
                head = file.read(HEAD_BYTES)
                refuse_stand_in(path, head)
                if not head.startswith(_MAGIC):
                    raise self._damaged("it does not begin with GGUF")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self._position = len(_MAGIC)
        version = self._integer("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path} is of GGUF version {version} (or big-endian); supported: 2 and 3, "
                "little-endian; convert the model again with a current llama.cpp"
            )
        num_tensors, num_keys = self._integer("<Q"), self._integer("<Q")
        if max(num_tensors, num_keys) > _MAX_COUNT:
            raise self._damaged(f"it has {num_tensors} tensors and {num_keys} keys")
        self._num_values = 0
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise self._damaged(f"key {key} occurs twice")
            self.metadata[key] = self._value(self._integer("<I"))
        self.tensors = self._read_tensors(num_tensors)

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor as a read-only view (F32, F16, BF16), else dequantized to a new fp32 array.

        Raises:
            CheckpointError: the package gguf cannot dequantize this type.
        """
        tensor = self.tensors[name]
        kind = self._gguf.GGMLQuantizationType(tensor.ggml_type)
        raw = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.begin)
        if kind.name == "BF16":
            return raw.view(bfloat16()).reshape(tensor.shape)
        if kind.name in _VIEWS:
            return raw.view(_VIEWS[kind.name]).reshape(tensor.shape)
        columns = tensor.shape[-1]
        num_rows = math.prod(tensor.shape[:-1])
        joined = math.gcd(num_rows, 1 << max(_LONG_ROW // columns, 1).bit_length() - 1)
        num_rows, columns = num_rows // joined, columns * joined
        rows = raw.reshape(num_rows, -1)
        weights = np.empty((num_rows, columns), np.float32)
        step = max(1, _CHUNK_WEIGHTS // columns)
        try:
            for start in range(0, num_rows, step):
                chunk = slice(start, start + step)
                weights[chunk] = self._gguf.dequantize(rows[chunk], kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of type {kind.name}, which the package gguf cannot "
                "dequantize; use an F16, Q8_0 or K-quant file"
            ) from error
        return weights.reshape(tensor.shape)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a valid GGUF file: {why}; download it again")

    def _take(self, num_bytes: int) -> int:
        """Advance over bytes that must be in the file; return their position."""
        position = self._position
        if num_bytes > len(self._map) - position:
            raise self._damaged(
                f"it ends at byte {len(self._map)}, but {num_bytes} bytes are due at {position}"
            )
        self._position += num_bytes
        if self._position > _MAX_METADATA_BYTES:
            raise self._damaged(f"its metadata has more than {_MAX_METADATA_BYTES >> 20} MiB")
        return position

    def _integer(self, layout: str) -> int:
        position = self._take(struct.calcsize(layout))
        value: int = struct.unpack_from(layout, self._map, position)[0]
        return value

    def _string(self) -> str:
        length = self._integer("<Q")
        position = self._take(length)
        try:
            return self._map[position : position + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"the text at byte {position} is no UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalars(kind, 1)[0]
        item_kind, count = self._integer("<I"), self._integer("<Q")
        if item_kind == _STRING:
            self._count_values(count)
            return [self._string() for _ in range(count)]
        return self._scalars(item_kind, count)

    def _count_values(self, count: int) -> None:
        self._num_values += count
        if self._num_values > _MAX_VALUES:
            raise self._damaged(f"its metadata has more than {_MAX_VALUES} values")

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:  # an array of arrays too: the format allows it, nobody writes it
            raise self._damaged(f"value type {kind} at byte {self._position} is unknown")
        dtype = np.dtype(_SCALARS[kind])
        position = self._take(count * dtype.itemsize)
        self._count_values(count)
        values = np.frombuffer(self._map, np.uint8, count * dtype.itemsize, position).view(dtype)
        if kind == 6:
            # The shortest decimal that rounds to the same fp32: 1e-05, not 9.999999747378752e-06.
            return [float(str(value)) for value in values]
        return list(values.tolist())

    def _read_tensors(self, count: int) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, expected a power of two")
        tensors: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self._string()
            if name in tensors:
                raise self._damaged(f"tensor {name} occurs twice")
            tensors[name] = self._tensor_info(name)
        start = -(-self._position // alignment) * alignment
        end = start
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
            begin = start + tensor.begin
            if begin < end or begin % alignment:
                raise self._damaged(f"tensor {name} overlaps another or is not aligned")
            end = begin + tensor.num_bytes
            if end > len(self._map):
                raise self._damaged(
                    f"tensor {name} ends at byte {end}, the file has {len(self._map)}"
                )
            tensors[name] = GgufTensor(tensor.ggml_type, tensor.shape, begin, tensor.num_bytes)
        return tensors

    def _tensor_info(self, name: str) -> GgufTensor:
        num_dims = self._integer("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._damaged(f"tensor {name} has {num_dims} dimensions")
        dims = [self._integer("<Q") for _ in range(num_dims)]
        if 0 in dims:
            raise self._damaged(f"tensor {name} has shape {dims[::-1]}")
        ggml_type, offset = self._integer("<I"), self._integer("<Q")
        if ggml_type in _REMOVED:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of ggml type {ggml_type}, which llama.cpp has "
                f"removed ({_REMOVED[ggml_type]}); use the Q4_0, Q8_0 or a K-quant file of the "
                "same model"
            )
        if ggml_type not in self._gguf.GGML_QUANT_SIZES:
            raise CheckpointError(
                f"{self.path}: tensor {name} is of ggml type {ggml_type}, which the installed "
                "package gguf does not know; upgrade it, or use an F16, Q8_0 or K-quant file"
            )
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[ggml_type]
        if dims[0] % block:
            raise self._damaged(f"tensor {name} has rows of {dims[0]}, no multiple of {block}")
        num_bytes = math.prod(dims) // block * block_bytes
        return GgufTensor(ggml_type, tuple(reversed(dims)), offset, num_bytes)
