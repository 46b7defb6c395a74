"""The token embedding table: memory-mapped, so only the rows that are used become resident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError, RequestError

EMBEDDINGS_NAME = "embeddings.safetensors"
TENSOR_NAME = "token_embeddings"
_MAX_HEADER_BYTES = 1 << 20


class EmbeddingTable:
    """Rows of ``[vocab, hidden]`` fp16 embeddings by token id.

    The file is safetensors (8-byte little-endian header length, JSON header, bytes) with the one
    tensor ``token_embeddings``; the few lines here save the runtime a dependency.

    Raises:
        BundleError: the file is not such a table.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                    raise ValueError(f"its header claims {header_bytes} bytes")
                header: dict[str, Any] = json.loads(file.read(header_bytes))
            entry = header[TENSOR_NAME]
            vocab, hidden = entry["shape"]
            if entry["dtype"] != "F16":
                raise ValueError(f"its type is {entry['dtype']}, F16 is expected")
            self._rows = np.memmap(
                path,
                dtype=np.float16,
                mode="r",
                offset=8 + header_bytes + entry["data_offsets"][0],
                shape=(int(vocab), int(hidden)),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} is not an embedding table: {error}; export the bundle again"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of rows."""
        return int(self._rows.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of a row."""
        return int(self._rows.shape[1])

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Copy the rows of ``ids`` (any shape) to ``[*ids.shape, hidden]``.

        Raises:
            RequestError: an id outside the table.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise RequestError(f"token id {wrong} is outside 0..{self.vocab_size - 1}")
        rows: NDArray[np.float16] = np.asarray(self._rows[ids])
        return rows

    def close(self) -> None:
        """Drop the mapping."""
        self._rows = np.empty((0, 0), dtype=np.float16)  # type: ignore[assignment]
