"""The token embedding table: it stays on disk, a row is read when its token comes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, BundleError, RequestError
from .io_spec import EMBEDDINGS_NAME as EMBEDDINGS_NAME
from .io_spec import EMBEDDINGS_TENSOR

_MAX_HEADER_BYTES = 1 << 20


class EmbeddingTable:
    """Rows of ``[vocab, hidden]`` fp16 embeddings by token id.

    The file is safetensors (8-byte little-endian header length, JSON header, bytes) with the one
    tensor ``token_embeddings``; the few lines here save the runtime a dependency. Rows are read
    with ``pread`` (2 us each from the page cache). A memory map would do the same, but the kernel
    maps 64 KiB around every row, and 450 MB of the table count as resident after some prompts.

    Raises:
        BundleError: the file is not such a table.
    """

    def __init__(self, path: Path) -> None:
        self._file = -1
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            header_bytes = int.from_bytes(os.pread(self._file, 8, 0), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {header_bytes} bytes")
            header: dict[str, Any] = json.loads(os.pread(self._file, header_bytes, 8))
            entry = header[EMBEDDINGS_TENSOR]
            self.vocab_size, self.hidden_size = (int(size) for size in entry["shape"])
            if entry["dtype"] != "F16":
                raise ValueError(f"its type is {entry['dtype']}, F16 is expected")
            start, end = entry["data_offsets"]
            self._start = 8 + header_bytes + int(start)
            self._row_bytes = 2 * self.hidden_size
            found, expected = os.fstat(self._file).st_size, 8 + header_bytes + int(end)
            if min(self.vocab_size, self.hidden_size) < 1 or start < 0:
                raise ValueError(f"its header describes an impossible tensor: {entry}")
            if end - start != self.vocab_size * self._row_bytes or found != expected:
                raise ValueError(f"it has {found} bytes, its header describes {expected}")
        # A header can also hold numbers without end and brackets without end.
        except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            self.close()
            raise BundleError(
                f"{path} is not an embedding table: {error}; export the bundle again"
            ) from error

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Read the rows of ``ids`` (any shape) to ``[*ids.shape, hidden]``.

        Raises:
            RequestError: an id outside the table.
            BackendError: the table is closed.
            BundleError: the file cannot be read any more.
        """
        self.check(ids)
        if self._file < 0:
            raise BackendError("the embedding table is closed; load the bundle again")
        rows = np.empty((*ids.shape, self.hidden_size), dtype=np.float16)
        targets = rows.reshape(-1, self.hidden_size)
        for target, token_id in zip(targets, ids.reshape(-1).tolist(), strict=True):
            offset = self._start + token_id * self._row_bytes
            if os.preadv(self._file, [target.data], offset) != self._row_bytes:
                raise BundleError("the embedding table was cut off while in use; export it again")
        return rows

    def check(self, ids: NDArray[np.int64]) -> None:
        """Refuse ids that have no row.

        Raises:
            RequestError: an id outside the table.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise RequestError(f"token id {wrong} is outside 0..{self.vocab_size - 1}")

    def close(self) -> None:
        """Close the file; calling it twice is harmless."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
