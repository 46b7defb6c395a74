"""Tensors of a ``.safetensors`` file as views of the mapped file, after a strict header check.

The code is our own, because the library's NumPy reader copies each tensor, and knows bfloat16
only in new versions. Format: https://huggingface.co/docs/safetensors (8 bytes little-endian
header size, a JSON header, one byte buffer without holes).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError, DependencyError, install_command
from edge.files import open_file

from .weight_files import HEAD_BYTES, refuse_stand_in

# A header has about 100 bytes per tensor; the reference implementation takes 100 MB, which become
# 3 GB of Python's objects.
_MAX_HEADER_BYTES = 16_000_000
_MAX_DIMS = 8
_MAX_SIZE = 1 << 48
_LENGTH_BYTES = 8
_NUMPY_TYPE = {
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",  # a byte other than 0 and 1 is no bool of NumPy
}
_ITEM_BYTES = {
    **{name: np.dtype(dtype).itemsize for name, dtype in _NUMPY_TYPE.items()},
    "BF16": 2,
    "F8_E4M3": 1,
}
FLOATS = ("F32", "F16", "BF16")
"""The types of float weights."""


def bfloat16() -> np.dtype[Any]:
    """NumPy's dtype for bfloat16.

    Raises:
        DependencyError: ml-dtypes is not installed.
    """
    return _ml_dtype("bfloat16")


def _ml_dtype(name: str) -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise DependencyError(
            f"reading {name} weights needs ml-dtypes; run: {install_command('export')}"
        ) from error
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: its type as the file names it, shape and bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One mapped file.

    Attributes:
        path: the file.
        entries: the header, by tensor name.
    """

    def __init__(self, path: Path, *, quantized: bool = False) -> None:
        """Map the file and check its header.

        Args:
            path: the file.
            quantized: whether it may hold integers and FP8, too.

        Raises:
            CheckpointError: the file cannot be read or its header is not valid.
        """
        self.path = path
        self._types = tuple(_ITEM_BYTES) if quantized else FLOATS
        try:
            with open_file(path) as file:
                refuse_stand_in(path, file.read(HEAD_BYTES))
                size = file.seek(0, 2)
                if size < _LENGTH_BYTES:
                    raise self._damaged(f"it has {size} bytes only")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self.entries = self._read_header()

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of a mapping of its own, which ends with the view.

        A mapping of the whole file would count every page read so far as this process's memory.
        """
        entry = self.entries[name]
        num_bytes = entry.end - entry.begin
        raw: NDArray[Any] = np.empty(0, dtype=np.uint8)
        if num_bytes:  # an empty range cannot be mapped
            raw = np.memmap(self.path, np.uint8, "r", entry.begin, (num_bytes,))
        if entry.dtype in _NUMPY_TYPE:
            dtype = np.dtype(_NUMPY_TYPE[entry.dtype])
        else:
            dtype = bfloat16() if entry.dtype == "BF16" else _ml_dtype("float8_e4m3fn")
        return raw.view(dtype).reshape(entry.shape)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a valid safetensors file: {why}; download it again"
        )

    def _read_header(self) -> dict[str, TensorEntry]:
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        start = _LENGTH_BYTES + length
        if length > _MAX_HEADER_BYTES or start > len(self._map):
            raise self._damaged(f"a header of {length} bytes does not fit")
        try:
            header = json.loads(self._map[_LENGTH_BYTES:start], object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"the header is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._damaged("the header is no JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, value, start) for name, value in header.items()}
        position = start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise self._damaged(
                    f"tensor {name} begins at byte {entry.begin}, expected {position}"
                )
            position = entry.end
        if position != len(self._map):
            raise self._damaged(f"its tensors end at byte {position} of {len(self._map)}")
        return entries

    def _entry(self, name: str, value: Any, start: int) -> TensorEntry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"tensor {name} has no dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not (_are_sizes(shape, _MAX_DIMS) and _are_sizes(offsets, 2) and len(offsets) == 2):
            raise self._damaged(
                f"tensor {name:.80} has shape {shape!r:.80} and data_offsets {offsets!r:.80}"
            )
        if not isinstance(dtype, str) or dtype not in self._types:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {dtype!r}, expected one of "
                f"{', '.join(self._types)}; use the original, unquantized checkpoint, or one whose "
                "config.json has a quantization_config"
            )
        num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
        if offsets[1] - offsets[0] != num_bytes:
            raise self._damaged(
                f"tensor {name} ({dtype}, {shape}) needs {num_bytes} bytes, "
                f"data_offsets are {offsets}"
            )
        return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(value: Any, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values
