"""Writes the token table as the bundle stores it: fp16 rows, or INT8 rows with one scale each.

The runtime reads a row per token, so its type costs quality and disk, but no speed. INT8 halves the
file. The values of a row have similar magnitudes, so one scale per row is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge.bundle import io_spec
from edge.model.names import TOKEN_TABLE
from edge_make.safetensors_writer import TensorSource

from .float_range import check_range

EmbeddingType = Literal["fp16", "int8"]
_CHUNK_ROWS = 8192
_LEVELS = np.float32(127.0)


def embedding_tensors(
    table: NDArray[Any], kind: EmbeddingType, progress: Callable[[int], None]
) -> dict[str, TensorSource]:
    """Name the tensors for `safetensors_writer.write_safetensors`, which computes them on the way.

    Args:
        table: ``[vocab, hidden]`` of any float type.
        kind: how rows are stored.
        progress: called with the values written so far.

    Raises:
        CheckpointError: a value is not finite or beyond fp16; raised while tensors are written.
    """
    shape = (table.shape[0], table.shape[1])
    if kind == "fp16":
        halves = (rows.astype(np.float16) for rows in _chunks(table))
        return {io_spec.EMBEDDINGS_TENSOR: TensorSource("F16", shape, _told(halves, progress))}
    integers = (quantize_table_rows(rows)[0] for rows in _chunks(table))
    scales = (_row_scales(rows) for rows in _chunks(table))
    return {
        io_spec.EMBEDDINGS_TENSOR: TensorSource("I8", shape, _told(integers, progress)),
        io_spec.EMBEDDINGS_SCALES: TensorSource("F32", shape[:1], scales),
    }


def _chunks(table: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    """Read the table in chunks of rows, refusing values that a bundle may not hold."""
    for start in range(0, len(table), _CHUNK_ROWS):
        rows = table[start : start + _CHUNK_ROWS].astype(np.float32)
        check_range(rows, TOKEN_TABLE, np.dtype(np.float16), "the embedding table may hold no more")
        yield rows


def _told(
    chunks: Iterable[NDArray[np.generic]], progress: Callable[[int], None]
) -> Iterator[NDArray[np.generic]]:
    """Pass chunks on and report the values taken so far."""
    done = 0
    for chunk in chunks:
        yield chunk
        done += chunk.size
        progress(done)


def quantize_table_rows(
    rows: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to INT8 multiples of a row's largest magnitude over 127.

    Args:
        rows: float32 ``[n, hidden]``.

    Returns:
        int8 ``[n, hidden]`` and float32 ``[n]``; a row of zeros has the scale 1.
    """
    scales = _row_scales(rows)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def _row_scales(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    scales: NDArray[np.float32] = np.abs(rows).max(axis=1) / _LEVELS
    # A quotient by a smaller scale would overflow; such a row is zero in fp16 anyway.
    scales[scales < np.finfo(np.float32).tiny] = 1
    return scales
