"""The directory of stored responses: what is kept, what goes, and what is left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from edge.errors import ConfigError, ResourceError
from edge_serve.stored.bounded import BoundedStore, Bounds, MemoryStore, TooLargeError
from edge_serve.stored.store import ResponseStore
from tests.edge_serve.stored.records import make_record, packed
from tests.standins.slot_rows import LAYOUT, random_rows, stacked
from tests.test_crashes import room


def open_store(path: Path, **bounds: int) -> ResponseStore:
    return ResponseStore(path, Bounds(**bounds), clock=lambda: 0)


def ids_of(store: BoundedStore, *numbers: int) -> list[int]:
    """Which of these records are there."""
    return [number for number in numbers if store.load(make_record(number).id) is not None]


def test_saved_responses_come_back(tmp_path: Path):
    store = open_store(tmp_path / "a" / "b")
    ended, waiting = make_record(1), make_record(2, answer=0)
    rows = random_rows(5)
    resumable = make_record(3, rows=5, data=packed(rows))
    for record in (ended, waiting):
        store.save(record)
    store.save_with_rows(resumable, packed(rows))
    store.close()
    again = open_store(tmp_path / "a" / "b")
    assert [again.load(record.id) for record in (ended, waiting, resumable)] == [
        ended, waiting, resumable,
    ]  # fmt: skip
    assert again.unfinished() == [waiting.id, resumable.id]
    found = again.load_rows(resumable.id, {})
    assert found is not None
    np.testing.assert_array_equal(stacked(found), stacked(rows))
    assert again.load_rows(ended.id, {}) is None
    again.delete(ended.id)
    assert ids_of(again, 1, 2, 3) == [2, 3]
    assert not list((tmp_path / "a" / "b").glob(f"*{ended.id}*"))
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_the_oldest_that_have_ended_make_room(tmp_path: Path):
    store = open_store(tmp_path / "s", responses=3)
    for number in (5, 1, 4):
        store.save(make_record(number, answer=0 if number == 1 else None))
    store.save(make_record(6))
    assert ids_of(store, 1, 4, 5, 6) == [1, 5, 6]
    store.save(make_record(6))  # itself takes no room
    store.save(make_record(7, answer=0))
    store.save(make_record(8, answer=0))
    assert ids_of(store, 1, 5, 6, 7, 8) == [1, 7, 8]
    with pytest.raises(ResourceError, match="3 stored responses have not ended"):
        store.save(make_record(9))
    assert ids_of(store, 1, 7, 8, 9) == [1, 7, 8]


def test_the_client_with_the_most_responses_makes_room(tmp_path: Path):
    """One client cannot push out the responses of another."""
    store = open_store(tmp_path / "s", responses=4)
    store.save(make_record(1, client="quiet"))
    for number in range(2, 20):
        store.save(make_record(number, client="loud"))
    assert ids_of(store, *range(1, 20)) == [1, 17, 18, 19]


def test_bytes_are_bounded(tmp_path: Path):
    store = open_store(tmp_path / "s", num_bytes=30_000)
    for number in range(1, 10):
        store.save(make_record(number, text="x" * 9000))
    kept = ids_of(store, *range(1, 10))
    assert kept == [7, 8, 9]
    assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) <= 30_000
    with pytest.raises(TooLargeError):
        store.save(make_record(10, text="x" * 31_000))
    assert ids_of(store, *range(1, 10)) == kept


def test_memory_keeps_the_last_ones_of_each_client():
    bounds = Bounds(responses=9, num_bytes=90_000, client_responses=3, client_bytes=30_000)
    store = MemoryStore(bounds, clock=lambda: 0)
    store.save(make_record(1, client="quiet"))
    for number in range(2, 8):
        store.save(make_record(number, client="loud"))
    assert ids_of(store, *range(1, 8)) == [1, 5, 6, 7]
    for number in range(8, 11):
        store.save(make_record(number, client="large", text="x" * 12_000))
    assert ids_of(store, *range(1, 11)) == [1, 5, 6, 7, 9, 10]
    with pytest.raises(TooLargeError):
        store.save(make_record(11, client="large", text="x" * 31_000))
    store.delete(make_record(9).id)
    store.save(make_record(10, client="large", text="new"))
    assert ids_of(store, *range(1, 11)) == [1, 5, 6, 7, 10]
    assert store.load(make_record(10).id) == make_record(10, client="large", text="new")


def test_memory_is_bounded_for_all_clients_together():
    bounds = Bounds(responses=6, num_bytes=90_000, client_responses=3, client_bytes=30_000)
    store = MemoryStore(bounds, clock=lambda: 0)
    for number in range(1, 13):
        store.save(make_record(number, client=str(number % 4)))
    assert ids_of(store, *range(1, 13)) == list(range(7, 13))


def test_rows_that_have_no_room_are_left_out(tmp_path: Path):
    data = np.ones(LAYOUT.num_bytes(50), np.uint8)
    store = open_store(tmp_path / "s", rows_bytes=int(1.5 * data.nbytes))
    for number in (1, 2):
        store.save_with_rows(make_record(number, rows=50, data=data), data)
    assert store.load_rows(make_record(1).id, {}) is not None
    assert store.load_rows(make_record(2).id, {}) is None
    second = store.load(make_record(2).id)
    assert second is not None
    assert second.unfinished is not None
    assert second.unfinished.answer == make_record(2, answer=3).unfinished.answer  # type: ignore[union-attr]


@pytest.mark.parametrize(("num_bytes", "fits"), [(0, False), (200, False), (4000, True)])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, num_bytes: int, fits: bool):
    data = np.ones(LAYOUT.num_bytes(500), np.uint8)
    store = open_store(tmp_path / "s")
    old = make_record(1, answer=0)
    store.save(old)
    new = make_record(1, rows=500, data=data)
    with room(num_bytes):
        if fits:
            store.save_with_rows(new, data)  # without its rows
            assert store.load_rows(new.id, {}) is None
        else:
            with pytest.raises(ResourceError, match="cannot write"):
                store.save_with_rows(new, data)
            assert store.load(old.id) == old
    store.close()
    assert open_store(tmp_path / "s").unfinished() == [old.id]
    assert len(list((tmp_path / "s").iterdir())) == 1


def test_old_responses_are_removed(tmp_path: Path):
    base = 1_800_000_000
    now = [base + 1000.0]
    store = ResponseStore(tmp_path / "s", Bounds(age_s=100), clock=lambda: now[0])
    for number in (1, base + 950, base + 990):
        store.save(make_record(number))
    store.save(make_record(base + 951, answer=0))
    now[0] = base + 1051
    # The first was made before a clock without a battery was set.
    assert ids_of(store, 1, base + 950, base + 951, base + 990) == [1, base + 951, base + 990]
    assert len(list((tmp_path / "s").iterdir())) == 3


def test_other_files_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = open_store(tmp_path / "s")
    for number in (1, 2, 3, 4):
        store.save(make_record(number))
    store.close()
    one, two, three, four = sorted((tmp_path / "s").iterdir())
    one.write_bytes(one.read_bytes()[:-1])
    two.write_bytes(two.read_bytes().replace(b"completed", b"completes"))
    three.rename(three.with_name("resp_x.response"))
    (tmp_path / "s" / "notes.txt").write_text("mine")
    (tmp_path / "s" / "resp_000000000000000000000000.response").mkdir()
    (tmp_path / "s" / ".resp_000000000000000000000001.response.tmp").write_bytes(b"half")
    before = sorted(path.name for path in (tmp_path / "s").iterdir())
    with caplog.at_level(logging.WARNING):
        store = open_store(tmp_path / "s", responses=1)
    assert len(caplog.records) == 5
    assert all("is left alone" in record.message for record in caplog.records)
    assert ids_of(store, 1, 2, 3, 4) == [4]
    before.remove(".resp_000000000000000000000001.response.tmp")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == before
    store.save(make_record(5))
    assert not four.exists()
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"


def test_starts_that_were_killed_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = open_store(tmp_path / "s")
    waiting, other = make_record(1, answer=0), make_record(2, answer=0)
    for record in (waiting, other):
        store.save(record)
    for killed in range(3):
        assert store.begin_start(waiting.id) == killed
        store.close()
        store = open_store(tmp_path / "s")
    assert store.begin_start(other.id) == 0
    store.end_start(waiting.id)
    assert store.begin_start(waiting.id) == 0
    store.save(make_record(2))  # has ended
    store.close()
    open_store(tmp_path / "s")
    assert {path.suffix for path in (tmp_path / "s").glob(f"{other.id}*")} == {".response"}
    assert not caplog.records


def test_a_directory_has_one_server(tmp_path: Path):
    store = open_store(tmp_path / "s")
    with pytest.raises(ConfigError, match="another server uses"):
        open_store(tmp_path / "s")
    store.close()
    open_store(tmp_path / "s").close()


def test_a_directory_that_others_may_read_is_refused(tmp_path: Path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        open_store(tmp_path / "s")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        open_store(tmp_path / "file")
