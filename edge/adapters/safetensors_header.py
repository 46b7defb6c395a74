"""Reads the header of a ``.safetensors`` file and checks it strictly before any tensor is used.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header size, a JSON header,
one byte buffer without holes). `export` maps checkpoints with it; adapters are read with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edge.errors import CheckpointError

# A header has about 100 bytes per tensor. The reference implementation allows 100 MB, which would
# become 3 GB of Python objects.
_MAX_HEADER_BYTES = 16_000_000
_MAX_DIMS = 8
_MAX_SIZE = 1 << 48
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: its type as the file names it, shape, and place in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(
    file: BinaryIO, path: Path, item_bytes: Mapping[str, int]
) -> dict[str, TensorEntry]:
    """Read the header of an open file, and check that it describes the file.

    Args:
        file: the open file, at any position.
        path: the file's path, for messages.
        item_bytes: bytes per element of each type that the file may hold, by the type's name.

    Returns:
        Every tensor by its name.

    Raises:
        CheckpointError: the header is invalid, or a tensor has another type.
        OSError: the file cannot be read.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    start = _LENGTH_BYTES + length
    if size < _LENGTH_BYTES:
        raise _damaged(path, f"it has {size} bytes only")
    if length > _MAX_HEADER_BYTES or start > size:
        raise _damaged(path, f"a header of {length} bytes does not fit")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, each, start, item_bytes) for name, each in header.items()}
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise _damaged(path, f"tensor {name} begins at byte {entry.begin}, expected {position}")
        position = entry.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position} of {size}")
    return entries


def _entry(
    path: Path, name: str, value: Any, start: int, item_bytes: Mapping[str, int]
) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_are_sizes(shape, _MAX_DIMS) and _are_sizes(offsets, 2) and len(offsets) == 2):
        raise _damaged(
            path, f"tensor {name:.80} has shape {shape!r:.80} and data_offsets {offsets!r:.80}"
        )
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} has type {dtype!r}, expected one of "
            f"{', '.join(item_bytes)}; use the original, unquantized checkpoint, or one whose "
            "config.json has a quantization_config"
        )
    num_bytes = math.prod(shape) * item_bytes[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise _damaged(
            path,
            f"tensor {name} ({dtype}, {shape}) needs {num_bytes} bytes, data_offsets are {offsets}",
        )
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a valid safetensors file: {why}; download it again")


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
