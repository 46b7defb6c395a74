"""The table against the file's own library, and against files that are no such table."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle.embeddings import EmbeddingTable
from edge.errors import BackendError, BundleError, RequestError
from tests.standins.scripted_backend import num_open_files

VOCAB, HIDDEN = 7, 5


def write(path: Path, header: Any, data: bytes) -> Path:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return path


@pytest.fixture
def rows() -> NDArray[np.float16]:
    return np.random.default_rng(0).standard_normal((VOCAB, HIDDEN)).astype(np.float16)


@pytest.fixture
def header() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "token_embeddings": {
            "dtype": "F16",
            "shape": [VOCAB, HIDDEN],
            "data_offsets": [0, 2 * VOCAB * HIDDEN],
        },
    }


@pytest.mark.parametrize("shape", [(4,), (1, 3), (2, 3), (2, 0), ()])
def test_rows_are_those_of_the_file(tmp_path: Path, rows: NDArray[np.float16], shape: Any):
    library = pytest.importorskip("safetensors.numpy", reason="writes the file")
    path = tmp_path / "embeddings.safetensors"
    library.save_file({"token_embeddings": rows}, path)
    table = EmbeddingTable(path)
    assert (table.vocab_size, table.hidden_size) == rows.shape
    ids = np.random.default_rng(1).integers(0, VOCAB, shape)
    found = table[np.asarray(ids)]
    assert found.dtype == np.float16
    assert found.tobytes() == rows[ids].tobytes()
    assert found.shape == (*shape, HIDDEN)
    found[...] = 0  # a copy: the file stays as it is
    assert table[np.arange(VOCAB)].tobytes() == rows.tobytes()
    table.close()


def test_ids_outside_the_table_are_refused(
    tmp_path: Path, rows: NDArray[np.float16], header: dict[str, Any]
):
    table = EmbeddingTable(write(tmp_path / "t", header, rows.tobytes()))
    for ids in ([0, -1], [VOCAB], [[1], [2**40]]):
        wrong = min(np.ravel(ids)) if -1 in ids else max(np.ravel(ids))
        for refuse in (table.__getitem__, table.check):
            with pytest.raises(RequestError, match=rf"token id {wrong} is outside 0\.\.6"):
                refuse(np.array(ids))
    table.close()


def test_a_closed_table_says_so(tmp_path: Path, rows: NDArray[np.float16], header: dict[str, Any]):
    table = EmbeddingTable(write(tmp_path / "t", header, rows.tobytes()))
    table.close()
    table.close()
    with pytest.raises(BackendError, match="closed"):
        table[np.array([0])]


def test_a_file_that_is_cut_off_while_in_use(
    tmp_path: Path, rows: NDArray[np.float16], header: dict[str, Any]
):
    path = write(tmp_path / "t", header, rows.tobytes())
    table = EmbeddingTable(path)
    os.truncate(path, path.stat().st_size - 1)
    assert table[np.array([0])].tobytes() == rows[:1].tobytes()
    with pytest.raises(BundleError, match="cut off"):
        table[np.array([VOCAB - 1])]
    table.close()


def test_a_disk_that_fails_once(
    tmp_path: Path,
    rows: NDArray[np.float16],
    header: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
):
    table = EmbeddingTable(write(tmp_path / "t", header, rows.tobytes()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(BundleError, match="Input/output error"):
            table[np.array([0])]
    assert table[np.array([0])].tobytes() == rows[:1].tobytes()
    table.close()


# ------------------------------------------------------------------------------- INT8 rows


def int8_header() -> dict[str, Any]:
    size = VOCAB * HIDDEN
    return {
        "token_embeddings": {"dtype": "I8", "shape": [VOCAB, HIDDEN], "data_offsets": [0, size]},
        "token_embeddings.scale": {
            "dtype": "F32",
            "shape": [VOCAB],
            "data_offsets": [size, size + 4 * VOCAB],
        },
    }


def int8_table() -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    rng = np.random.default_rng(2)
    integers = rng.integers(-127, 128, (VOCAB, HIDDEN)).astype(np.int8)
    return integers, rng.uniform(1e-4, 2.0, VOCAB).astype(np.float32)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 0), ()])
def test_int8_rows_are_multiples_of_their_scale(tmp_path: Path, shape: Any):
    integers, scales = int8_table()
    data = integers.tobytes() + scales.tobytes()
    table = EmbeddingTable(write(tmp_path / "embeddings.safetensors", int8_header(), data))
    assert (table.vocab_size, table.hidden_size) == (VOCAB, HIDDEN)
    ids = np.asarray(np.random.default_rng(1).integers(0, VOCAB, shape))
    found = table[ids]
    expected = (integers.astype(np.float32) * scales[:, None]).astype(np.float16)[ids]
    assert found.dtype == np.float16
    assert found.shape == (*shape, HIDDEN)
    assert found.tobytes() == expected.tobytes()
    table.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F16"}, "its scales are not those of the rows"),
        ({"shape": [VOCAB + 1]}, "its scales are not those of the rows"),
        ({"shape": [VOCAB, 1]}, "its scales are not those of the rows"),
        ({"data_offsets": [0, 4 * VOCAB]}, "its scales are not those of the rows"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    header = int8_header()
    header["token_embeddings.scale"].update(change)
    path = write(tmp_path / "t", header, bytes(VOCAB * HIDDEN + 4 * VOCAB))
    with pytest.raises(BundleError, match=message):
        EmbeddingTable(path)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_not_positive_is_refused(tmp_path: Path, scale: float):
    integers, scales = int8_table()
    scales[3] = scale
    path = write(tmp_path / "t", int8_header(), integers.tobytes() + scales.tobytes())
    with pytest.raises(BundleError, match="a scale of its rows is not positive"):
        EmbeddingTable(path)


def test_int8_rows_without_scales_are_refused(tmp_path: Path):
    header = int8_header()
    del header["token_embeddings.scale"]
    path = write(tmp_path / "t", header, bytes(VOCAB * HIDDEN))
    with pytest.raises(BundleError, match=r"token_embeddings\.scale"):
        EmbeddingTable(path)


ENTRY: dict[str, Any] = {
    "dtype": "F16",
    "shape": [VOCAB, HIDDEN],
    "data_offsets": [0, 2 * VOCAB * HIDDEN],
}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\xff",
        b"[" * 100_000,
        {"token_embeddings": None},
        {"token_embeddings": {**ENTRY, "dtype": "BF16"}},
        {"token_embeddings": {**ENTRY, "shape": [VOCAB]}},
        {"token_embeddings": {**ENTRY, "shape": [VOCAB, HIDDEN, 1]}},
        {"token_embeddings": {**ENTRY, "shape": [VOCAB + 1, HIDDEN]}},
        {"token_embeddings": {**ENTRY, "shape": [-VOCAB, -HIDDEN]}},
        {"token_embeddings": {**ENTRY, "shape": [0, 0], "data_offsets": [70, 70]}},
        {"token_embeddings": {**ENTRY, "shape": [VOCAB, 10**30]}},
        {"token_embeddings": {**ENTRY, "shape": [VOCAB, float("inf")]}},
        {"token_embeddings": {**ENTRY, "data_offsets": [-2, 2 * VOCAB * HIDDEN - 2]}},
        {"token_embeddings": {**ENTRY, "data_offsets": [2, 2 * VOCAB * HIDDEN + 2]}},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, rows: NDArray[np.float16], header: Any):
    path = write(tmp_path / "t", header, rows.tobytes())
    before = num_open_files()
    with pytest.raises(BundleError, match=r"not an embedding table.*export the bundle again"):
        EmbeddingTable(path)
    assert num_open_files() == before


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_short_files_are_refused(tmp_path: Path, header: dict[str, Any], size: int):
    path = write(tmp_path / "t", header, b"")
    os.truncate(path, size)
    with pytest.raises(BundleError):
        EmbeddingTable(path)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="No such file"):
        EmbeddingTable(tmp_path / "absent")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["token_embeddings", "token_embeddings.scale"]),
    key=st.sampled_from(sorted(ENTRY)),
    value=json_values,
)
def test_any_int8_header_gives_a_table_or_a_bundle_error(
    tmp_path: Path, name: str, key: str, value: Any
):
    header = int8_header()
    header[name][key] = value
    integers, scales = int8_table()
    path = write(tmp_path / "t8", header, integers.tobytes() + scales.tobytes())
    try:
        table = EmbeddingTable(path)
    except BundleError:
        return
    assert table[np.arange(table.vocab_size)].size == VOCAB * HIDDEN
    table.close()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(sorted(ENTRY)), value=json_values)
def test_any_header_gives_a_table_or_a_bundle_error(tmp_path: Path, key: str, value: Any):
    path = write(tmp_path / "t", {"token_embeddings": {**ENTRY, key: value}}, bytes(70))
    try:
        table = EmbeddingTable(path)
    except BundleError:
        return
    assert table[np.arange(table.vocab_size)].size == VOCAB * HIDDEN
    table.close()
