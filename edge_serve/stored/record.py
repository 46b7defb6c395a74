"""Defines `Record`, one stored response, and the file that holds it.

The layout of a file: `_MAGIC`, the record's length (8 bytes, little-endian), the record (JSON), its
SHA-256 (32 bytes), and the cache rows of a response that was put away, as `pack_rows` gives them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends import Floats
from edge.bundle.kv_scales import Scales, unpack_rows
from edge.files import MALFORMED, open_file
from edge.runtime.prefix_store import Layout

_MAGIC = b"edge-llm response 1\n"
_DIGEST_BYTES = 32
_MAX_RECORD_BYTES = 1 << 28
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class UnusableError(Exception):
    """A file that is not what it should be; the message says why."""


class StoredRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the rows in a file are.

    Attributes:
        layout: origin and shape.
        ids: the token of each row.
        prefilled, shared, shareable: see `edge.runtime.kv_cache.Slot`.
        sha256: of the packed rows.
    """

    layout: Layout
    ids: list[_Id]
    prefilled: _Count
    shared: _Count
    shareable: bool
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows in a file."""
        return self.layout.num_bytes(len(self.ids))


class Unfinished(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What it takes to go on with a response, in another process too.

    Attributes:
        model: the name under which the model was served.
        bundle: `bundle_key` of what ran it.
        seed: of the random numbers.
        prompt: token ids of the prompt.
        answer: token ids of the answer so far.
        pending: see `edge.runtime.scheduler.PutAway`.
        salt, origin: see `edge_serve.http.access.Client`.
        arm: see `edge_serve.api.respond.Turn`.
        priority: likewise.
        left_s: seconds that it may still take; None sets no limit.
        begins: how often it was begun anew since it was last put away: by servers that were killed.
        rows: the cache rows in the file; None where prompt and answer are to be read again.
    """

    model: str
    bundle: str
    seed: _Count
    prompt: Annotated[list[_Id], msgspec.Meta(min_length=1)]
    answer: list[_Id] = []
    pending: _Count = 0
    salt: str = ""
    origin: str = ""
    arm: str | None = None
    priority: int = 0
    left_s: float | None = None
    begins: _Count = 0
    rows: StoredRows | None = None


class Record(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One stored response.

    Attributes:
        id: its id, which names its file.
        client: name of the client that made it, who alone may see it.
        created_at: Unix seconds.
        request: the body of its request.
        response: the answer as it stands, as clients get it.
        unfinished: what it takes to go on; None at its end.
    """

    id: str
    client: str
    created_at: int
    request: dict[str, Any]
    response: dict[str, Any]
    unfinished: Unfinished | None = None


def head_of(record: Record) -> bytes:
    """Encode all of a file but the rows."""
    data = msgspec.json.encode(record)
    return _MAGIC + len(data).to_bytes(8, "little") + data + hashlib.sha256(data).digest()


def read_record(path: Path) -> Record:
    """Read a file but for its rows.

    Raises:
        OSError: it cannot be read.
        UnusableError: it is damaged or something else.
    """
    with open_file(path) as file:
        return _read(file)[0]


def read_rows(path: Path, scales: Scales) -> Floats | None:
    """Read the rows of a file, for `Backend.write_slot`; None where it has none.

    Args:
        path: the file.
        scales: of the backend's 8-bit planes, which the layout was compared with.

    Raises:
        OSError: it cannot be read.
        UnusableError: it is damaged or something else.
    """
    with open_file(path) as file:
        record, start = _read(file)
    rows = None if record.unfinished is None else record.unfinished.rows
    if rows is None:
        return None
    data = np.fromfile(path, dtype=np.uint8, offset=start)
    if rows_sha256(data) != rows.sha256:
        raise UnusableError("it is damaged (its rows)")
    shape = rows.layout.shape(len(rows.ids))
    return unpack_rows(data, shape, np.dtype(rows.layout.dtype), scales)


def rows_sha256(data: NDArray[np.uint8]) -> str:
    """SHA-256 of packed rows."""
    return hashlib.sha256(data.data).hexdigest()


def _read(file: BinaryIO) -> tuple[Record, int]:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise UnusableError("it is no stored response of this version")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MAX_RECORD_BYTES:
        raise UnusableError("it is damaged (the record's length)")
    data, digest = file.read(length), file.read(_DIGEST_BYTES)
    if hashlib.sha256(data).digest() != digest:
        raise UnusableError("it is damaged (the record)")
    try:
        record = msgspec.json.decode(data, type=Record)
    except MALFORMED as error:
        raise UnusableError(f"it is of another version ({error})") from error
    rows = None if record.unfinished is None else record.unfinished.rows
    if rows is not None and len(rows.layout.int8_planes) > rows.layout.planes:
        raise UnusableError("it is damaged (the layout of its rows)")
    start = file.tell()
    expected = start + (0 if rows is None else rows.num_bytes)
    if (size := os.fstat(file.fileno()).st_size) != expected:
        raise UnusableError(f"it has {size} bytes, and its record describes {expected}")
    return record, start
