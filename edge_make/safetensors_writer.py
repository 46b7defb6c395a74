"""Writes a safetensors file from chunks, so that a table larger than memory streams through.

Format: 8-byte little-endian header length, JSON header, tensor bytes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "I64": 8, "BOOL": 1}


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: its safetensors type, its shape, and its rows chunk by chunk."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[NDArray[np.generic]]


def write_safetensors(path: Path, tensors: Mapping[str, TensorSource]) -> None:
    """Write all tensors in the order given; chunks are taken one tensor after the other.

    Raises:
        ValueError: chunks do not add up to the shape.
    """
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The data starts on a page, so that a memory-mapped row does not span two needlessly.
    encoded += b" " * (-(8 + len(encoded)) % 4096)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            written = 0
            for chunk in tensor.chunks:
                written += file.write(np.ascontiguousarray(chunk).view(np.uint8).data)
            expected = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
            if written != expected:
                raise ValueError(f"{name}: {written} bytes written, its shape needs {expected}")
