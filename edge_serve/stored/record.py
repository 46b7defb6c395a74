"""Defines `Record`, one stored response, and the file that holds it.

The layout of a file: `_MAGIC`, the record's length (8 bytes, little-endian), the record (JSON), its
SHA-256 (32 bytes), and the cache rows of a saved unfinished response, packed by `pack_rows`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.kv_scales import Scales, unpack_rows
from edge.files import MALFORMED, open_file
from edge.model.slot_rows import SlotRows
from edge.runtime.prefix_store import Layout

_MAGIC = b"edge-llm response 1\n"
_DIGEST_BYTES = 32
_MAX_RECORD_BYTES = 1 << 28
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class UnusableError(Exception):
    """A file that is damaged or something else; the message says why."""


class StoredRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A description of the cache rows in a file.

    Attributes:
        layout: origin and shape.
        ids: token id of each row.
        prefilled, shared, shareable: counts of a slot (`edge.runtime.kv_cache.Slot`).
        sha256: hash of the packed rows.
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
    """The state from which a response continues, even in another process.

    Attributes:
        model: name under which the model was served.
        bundle: `bundle_key` of the bundle that ran it.
        seed: seed of the random numbers.
        prompt: token ids of the prompt.
        answer: token ids of the answer so far.
        pending: pending token of the sequence (`edge.runtime.scheduler.Suspended`).
        salt, origin: the client's salt and origin (`edge_serve.http.access.Client`).
        arm: arm of the A/B split that chose the model (`edge_serve.api.respond.Turn`).
        priority: the request's priority; lower runs first.
        left_s: seconds that it may still take; None sets no limit.
        begins: number of starts since it was last saved: each was by a server that was killed.
        rows: the cache rows in the file; None if prompt and answer have to be read again.
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
        client: name of the client that made it; only that client may see it.
        created_at: Unix seconds.
        request: what its request asks, in JSON.
        response: the answer so far, as clients get it, in JSON.
        unfinished: state to continue from; None once it has ended.
    """

    id: str
    client: str
    created_at: int
    request: msgspec.Raw
    response: msgspec.Raw
    unfinished: Unfinished | None = None


def head_of(record: Record) -> bytes:
    """Encode a file up to its rows."""
    data = msgspec.json.encode(record)
    return _MAGIC + len(data).to_bytes(8, "little") + data + hashlib.sha256(data).digest()


def read_record(path: Path) -> Record:
    """Read a file without its rows.

    Raises:
        OSError: it cannot be read.
        UnusableError: it is damaged or something else.
    """
    with open_file(path) as file:
        return _read(file)[0]


def read_rows(path: Path, scales: Scales) -> SlotRows | None:
    """Read the rows of a file, for `Backend.write_slot`; None if it has none.

    Args:
        path: the file.
        scales: scales of the backend's 8-bit planes; the caller has compared them with the layout.

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
    return unpack_rows(data, rows.layout.tensors, len(rows.ids), scales)


def rows_sha256(data: NDArray[np.uint8]) -> str:
    """Hash packed rows by SHA-256."""
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
    start = file.tell()
    expected = start + (0 if rows is None else rows.num_bytes)
    size = os.fstat(file.fileno()).st_size
    if size != expected and (rows is None or rows.layout.tensors):
        raise UnusableError(f"it has {size} bytes, and its record describes {expected}")
    return record, start
