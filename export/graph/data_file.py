"""External data of an ONNX model, written tensor by tensor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime maps external data page by page; onnx.proto3 asks for 4 KiB alignment for that.
_ALIGNMENT = 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie.

    Attributes:
        name: initializer name.
        onnx_type: ``onnx.TensorProto`` data type.
        dims: logical shape (an int4 tensor holds two elements a byte).
        file: name of the data file, relative to the model.
        offset, num_bytes: its bytes in that file.
    """

    name: str
    onnx_type: int
    dims: tuple[int, ...]
    file: str
    offset: int
    num_bytes: int


class DataFile:
    """Appends aligned tensors to one file; a context manager.

    Args:
        path: the file.
        length: go on behind so many bytes of a file that is there; None begins it.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb" if length is None else "r+b")
        if length is not None:
            self._file.truncate(length)
            self._file.seek(length)

    def sync(self) -> int:
        """Make what was added last; returns the file's length in bytes."""
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

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
