"""Reads tensors of a ``.safetensors`` file as views of the mapped file, after a strict check.

The code is our own, because the library's NumPy reader copies each tensor, and knows bfloat16
only in new versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.adapters.safetensors_header import TensorEntry as TensorEntry
from edge.adapters.safetensors_header import read_header
from edge.errors import CheckpointError, DependencyError, install_command
from edge.files import open_file

from .weight_files import HEAD_BYTES, refuse_stand_in

_NUMPY_TYPE = {
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",  # a byte other than 0 and 1 is no bool in NumPy
}
_ITEM_BYTES = {
    **{name: np.dtype(dtype).itemsize for name, dtype in _NUMPY_TYPE.items()},
    "BF16": 2,
    "F8_E4M3": 1,
}
FLOATS = ("F32", "F16", "BF16")
"""The types of float weights."""


def bfloat16() -> np.dtype[Any]:
    """Return NumPy's dtype for bfloat16.

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
        types = tuple(_ITEM_BYTES) if quantized else FLOATS
        try:
            with open_file(path) as file:
                refuse_stand_in(path, file.read(HEAD_BYTES))
                self.entries = read_header(file, path, {name: _ITEM_BYTES[name] for name in types})
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def tensor(self, name: str) -> NDArray[Any]:
        """Return a tensor as a read-only view of its own mapping, which ends with the view.

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
