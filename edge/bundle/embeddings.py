"""Reads the token embedding table: it stays on disk, and a row is read when its token comes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError, BundleError, RequestError

from .io_spec import EMBEDDINGS_NAME as EMBEDDINGS_NAME
from .io_spec import EMBEDDINGS_SCALES, EMBEDDINGS_TENSOR

PICTURE_IDS = 1 << 40
"""Token ids from here on are rows of pictures (`edge.vision.rows`); no vocabulary reaches them."""
_MAX_HEADER_BYTES = 1 << 20


class EmbeddingTable:
    """Rows of ``[vocab, hidden]`` embeddings by token id, as fp16.

    The file is safetensors (8-byte little-endian header length, JSON header, bytes) with the tensor
    ``token_embeddings``: fp16, or INT8 with its ``token_embeddings.scale``, fp32 ``[vocab]``. The
    few lines here save the runtime a dependency. Rows are read with ``pread`` (2 us each from the
    page cache), the scales once. A memory map would work as well, but the kernel maps 64 KiB around
    every row, and 450 MB of the table count as resident after some prompts.

    Args:
        path: the file; with a descriptor, only used in messages.
        descriptor: descriptor of the file, if it is open already; it is duplicated.

    Attributes:
        has_pictures: whether it also has rows of pictures, from `PICTURE_IDS` on.

    Raises:
        BundleError: the file is not such a table.
    """

    has_pictures = False

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self._file = -1
        try:
            if descriptor is None:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            else:
                self._file = os.dup(descriptor)  # the copy is not inherited by children either
            header_bytes = int.from_bytes(os.pread(self._file, 8, 0), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {header_bytes} bytes")
            header: dict[str, Any] = json.loads(os.pread(self._file, header_bytes, 8))
            found = os.fstat(self._file).st_size
            self._read_layout(header, 8 + header_bytes, found)
        # A header can also hold numbers that are too large, and brackets nested too deep.
        except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            self.close()
            raise BundleError(
                f"{path} is not an embedding table: {error}; export the bundle again"
            ) from error

    def _read_layout(self, header: dict[str, Any], data: int, file_bytes: int) -> None:
        """Find the rows; ``data`` is the offset of the tensors in the file."""
        entry = header[EMBEDDINGS_TENSOR]
        self.vocab_size, self.hidden_size = (int(size) for size in entry["shape"])
        dtype = entry["dtype"]
        if dtype not in ("F16", "I8"):
            raise ValueError(f"its type is {dtype}, F16 or I8 is expected")
        self._is_int8 = dtype == "I8"
        self._row_bytes = self.hidden_size * (1 if self._is_int8 else 2)
        start, end = entry["data_offsets"]
        self._start = data + int(start)
        if min(self.vocab_size, self.hidden_size) < 1 or start < 0:
            raise ValueError(f"its header describes an impossible tensor: {entry}")
        last = end
        if self._is_int8:
            scales = header[EMBEDDINGS_SCALES]
            first, last = scales["data_offsets"]
            wanted = (["F32", [self.vocab_size]], [end, end + 4 * self.vocab_size])
            if ([scales["dtype"], scales["shape"]], [first, last]) != wanted:
                raise ValueError(f"its scales are not those of the rows: {scales}")
        if end - start != self.vocab_size * self._row_bytes or file_bytes != data + int(last):
            raise ValueError(f"it has {file_bytes} bytes, its header describes {data + int(last)}")
        if self._is_int8:
            raw = os.pread(self._file, 4 * self.vocab_size, data + int(end))
            self._scales = np.frombuffer(raw, dtype="<f4").copy()
            if not (np.isfinite(self._scales).all() and (self._scales > 0).all()):
                raise ValueError("a scale of its rows is not positive")

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read the rows of ``ids`` (any shape) to ``[*ids.shape, hidden]``.

        Raises:
            RequestError: an id is outside the table.
            BackendError: the table is closed.
            BundleError: the file can no longer be read.
        """
        self.check(ids)
        if self._file < 0:
            raise BackendError("the embedding table is closed; load the bundle again")
        flat = ids.reshape(-1)
        dtype = np.int8 if self._is_int8 else np.float16
        rows = np.empty((len(flat), self.hidden_size), dtype=dtype)
        for target, token_id in zip(rows, flat.tolist(), strict=True):
            offset = self._start + token_id * self._row_bytes
            try:
                read_bytes = os.preadv(self._file, [target.data], offset)
            except OSError as error:
                raise BundleError(
                    f"cannot read the embedding table: {error.strerror}; check its disk"
                ) from error
            if read_bytes != self._row_bytes:
                raise BundleError("the embedding table was cut off while in use; export it again")
        if self._is_int8:
            rows = (rows.astype(np.float32) * self._scales[flat, None]).astype(np.float16)
        return rows.reshape(*ids.shape, self.hidden_size)

    def check(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids that have no row.

        Raises:
            RequestError: an id is outside the table.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise RequestError(f"token id {wrong} is outside 0..{self.vocab_size - 1}")

    def close(self) -> None:
        """Close the file; calling it twice is harmless."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
