"""Records of the engines that this machine built."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edge.bundle import engine_records
from edge.bundle.engine_records import RECORDS_VARIABLE, why_unrecorded
from edge.errors import ConfigError
from edge_make.engine_record import check_recording, forget_engine, record_engine

DATA = b'{"plan": "engine.plan"}'


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "state" / "edge-llm" / "records"
    monkeypatch.setenv(RECORDS_VARIABLE, str(directory))
    monkeypatch.setattr(engine_records, "DEFAULT_RECORDS", tmp_path / "none")
    return directory


def test_a_record_counts_until_it_is_taken_away(records: Path, tmp_path: Path):
    assert why_unrecorded(DATA) == f"no record in {records}; no record in {tmp_path / 'none'}"
    record_engine(tmp_path / "engine.json", DATA)
    record_engine(tmp_path / "engine.json", DATA)  # once more is no harm
    assert why_unrecorded(DATA) is None
    assert why_unrecorded(DATA + b" ") is not None
    sha256 = hashlib.sha256(DATA).hexdigest()
    assert [path.name for path in records.iterdir()] == [sha256]
    forget_engine(sha256)
    forget_engine(sha256)
    assert why_unrecorded(DATA) is not None


def test_other_users_can_read_whatever_the_umask_is(records: Path, tmp_path: Path):
    """The server is another user than who builds."""
    before = os.umask(0o077)
    try:
        record_engine(tmp_path / "engine.json", DATA)
    finally:
        os.umask(before)
    (record,) = records.iterdir()
    modes = [path.stat().st_mode & 0o777 for path in (record, records, *records.parents[:2])]
    assert modes == [0o644, 0o755, 0o755, 0o755]


def test_no_engine_is_recorded_in_a_directory_that_others_may_write(records: Path, tmp_path: Path):
    records.mkdir(parents=True)
    records.parent.chmod(0o775)
    with pytest.raises(ConfigError, match=rf"others \(mode 0775\) can change {records.parent}"):
        record_engine(tmp_path / "engine.json", DATA)
    assert not list(records.iterdir())
    records.parent.chmod(0o755)
    record_engine(tmp_path / "engine.json", DATA)


def test_an_unusable_directory_of_records_names_its_variable(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "file" / "records"))
    for call in (check_recording, lambda: record_engine(tmp_path / "engine.json", DATA)):
        with pytest.raises(ConfigError, match=rf"Not a directory; {RECORDS_VARIABLE} names"):
            call()
    monkeypatch.setenv(RECORDS_VARIABLE, str(records))
    check_recording()
    assert not list(records.iterdir())
