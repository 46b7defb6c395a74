"""Records for the tests of the store."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.kv_scales import pack_rows
from edge.model.slot_rows import SlotRows
from edge_serve.stored.record import Record, StoredRows, Unfinished, rows_sha256
from tests.standins.slot_rows import LAYOUT


def packed(rows: SlotRows) -> NDArray[np.uint8]:
    return pack_rows(rows, {})


def make_record(
    number: int,
    *,
    client: str = "client",
    answer: int | None = None,
    rows: int = 0,
    data: NDArray[np.uint8] | None = None,
    text: str = "",
) -> Record:
    """A record that was made at second ``number``; it has ended without ``answer`` and ``rows``."""
    record = Record(
        id=f"resp_{number:024x}",
        client=client,
        created_at=number,
        request=msgspec.Raw(msgspec.json.encode({"input": text})),
        response=msgspec.Raw(b'{"status":"completed"}'),
    )
    if rows:
        answer = 3
    if answer is not None:
        record.response = msgspec.Raw(b'{"status":"in_progress"}')
        record.unfinished = Unfinished(
            model="tiny",
            bundle="b",
            seed=7,
            prompt=[1, 2],
            answer=[3] * answer,
        )
    if rows and record.unfinished is not None:
        data = np.ones(LAYOUT.num_bytes(rows), np.uint8) if data is None else data
        sha256 = rows_sha256(data)
        record.unfinished.rows = StoredRows(LAYOUT, list(range(rows)), rows, 0, True, sha256)
    return record
