"""Writes the external data of an ONNX model, tensor by tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime maps external data page by page; onnx.proto3 asks for 4 KiB alignment for that.
_ALIGNMENT = 4096


@dataclass(frozen=True)
class StoredTensor:
    """Name, type and place of a tensor's bytes.

    Attributes:
        name: initializer name.
        onnx_type: ``onnx.TensorProto`` data type.
        dims: logical shape (an int4 tensor holds two elements a byte).
        file: name of the data file, relative to the model.
        offset, num_bytes: where the tensor's bytes are in that file.
    """

    name: str
    onnx_type: int
    dims: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int


@contextlib.contextmanager
def open_data_file(path: Path, length: int | None = None) -> Iterator[DataFile]:
    """Open a data file, to be closed when the block ends.

    Args:
        path: the file.
        length: continue an existing file after this many bytes; None begins a new one.
    """
    with path.open("wb" if length is None else "r+b") as file:
        if length is not None:
            file.truncate(length)
            file.seek(length)
        yield DataFile(path, file)


class DataFile:
    """Appends aligned tensors to one open file; `open_data_file` makes it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file

    def sync(self) -> int:
        """Force all that was added to the disk; return the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def add(
        self, name: str, onnx_type: int, dims: tuple[int, ...], data: NDArray[np.generic]
    ) -> StoredTensor:
        """Append the little-endian bytes of ``data`` (already packed for ``onnx_type``)."""
        padding = -self._file.tell() % _ALIGNMENT
        self._file.write(bytes(padding))
        offset = self._file.tell()
        contiguous = np.ascontiguousarray(data)
        self._file.write(contiguous.view(np.uint8).data)
        return StoredTensor(name, onnx_type, dims, self.path.name, offset, contiguous.nbytes)
