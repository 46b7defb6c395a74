"""Parts handed out to workers that are slow, die or fail. No Ray."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import BackendError, ContextLengthError, DeadlineError, EdgeError
from edge_fleet.devices.fanout import fan_out
from edge_fleet.devices.members import LostError

Worker = Callable[[int], int]


class Dying:
    """Squares numbers, and is lost in the call with this number, from 0; None never."""

    def __init__(self, dies_at: int | None) -> None:
        self.calls: list[int] = []
        self._dies_at = dies_at

    def __call__(self, part: int) -> int:
        assert self._dies_at is None or len(self.calls) <= self._dies_at, "it was lost already"
        self.calls.append(part)
        if len(self.calls) - 1 == self._dies_at:
            raise LostError("its power is gone")
        return part**2


def run(parts: list[int], workers: dict[str, Worker], ahead: int = 99) -> list[int]:
    return list(fan_out(parts, workers, ahead=ahead, lost=lambda name, error: None))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 30),
    st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_whoever_dies_every_part_comes_once_and_in_order(
    num_parts: int, deaths: list[int | None], ahead: int
):
    workers = {str(i): Dying(dies_at) for i, dies_at in enumerate([*deaths, None])}
    lost: list[str] = []
    done: list[int] = []
    parts = [100 + i for i in range(num_parts)]
    results: list[int] | None = None
    with contextlib.suppress(DeadlineError):  # two were lost with one part
        results = list(
            fan_out(
                parts,
                workers,
                ahead=ahead,
                lost=lambda name, error: lost.append(name),
                done=done.append,
            )
        )
    tries = Counter(part for worker in workers.values() for part in worker.calls)
    assert len(done) == len(set(done))
    if results is None:
        assert max(tries.values()) == 2
        return
    assert results == [part**2 for part in parts]
    assert sorted(done) == parts
    assert sum(tries.values()) == num_parts + len(lost)  # a part of a lost one was done once more
    assert len(set(lost)) == len(lost)


def test_a_lost_part_goes_first():
    done: list[int] = []
    begun, died = threading.Event(), threading.Event()

    def dies(part: int) -> int:
        assert begun.wait(10)
        raise LostError(f"with {part}")

    def lives(part: int) -> int:
        begun.set()
        assert died.wait(10)
        done.append(part)
        return part

    workers = {"dies": dies, "lives": lives}
    reasons: list[str] = []

    def lost(name: str, error: LostError) -> None:
        reasons.append(str(error))
        died.set()

    assert list(fan_out([0, 1, 2, 3], workers, ahead=9, lost=lost)) == [0, 1, 2, 3]
    (reason,) = reasons
    assert done == {"with 0": [1, 0, 2, 3], "with 1": [0, 1, 2, 3]}[reason]


def test_results_do_not_pile_up_behind_a_slow_part():
    begun: list[int] = []
    go_on, slow_has_begun, piled = threading.Event(), threading.Event(), threading.Event()

    def slow(part: int) -> int:
        slow_has_begun.set()
        assert go_on.wait(10)
        return part

    def quick(part: int) -> int:
        assert slow_has_begun.wait(10)
        begun.append(part)
        if len(begun) == 3:
            piled.set()
        return part

    taken: list[int] = []
    # One of the first two parts is held up, and with it whatever is four after it.
    results = fan_out(range(10), {"slow": slow, "quick": quick}, ahead=4, lost=_never)
    reader = threading.Thread(target=lambda: taken.extend(results))
    reader.start()
    assert piled.wait(10)
    reader.join(0.2)  # time to do wrong
    assert max(begun) <= 4
    assert len(taken) <= 1
    go_on.set()
    reader.join(10)
    assert taken == list(range(10))


def _never(name: str, error: LostError) -> None:
    raise AssertionError((name, error))


@pytest.mark.parametrize(("hangs_at", "ahead"), [(1, 3), (9, 99)])
def test_a_worker_that_hangs_holds_nobody_up(hangs_at: int, ahead: int):
    """Neither with its first part, behind which nothing may pile up, nor with the last one."""
    hung, released = threading.Event(), threading.Event()
    calls = [0]
    done: list[int] = []
    late: list[tuple[str, str]] = []

    def quick(part: int) -> int:
        hung.wait()
        return part**2

    def hangs(part: int) -> int:
        calls[0] += 1
        if calls[0] == hangs_at:
            hung.set()
            released.wait()
        return part**2

    results = fan_out(
        range(10),
        {"hangs": hangs, "quick": quick},
        ahead=ahead,
        lost=_never,
        done=done.append,
        late=lambda name, other: late.append((name, other)),
        patience_s=0.05,
    )
    assert list(results) == [part**2 for part in range(10)]
    assert sorted(done) == list(range(10))
    assert late == [("hangs", "quick")]
    released.set()


def test_a_part_that_takes_a_little_longer_is_left_to_its_worker():
    late: list[str] = []

    def slow(part: int) -> int:
        time.sleep(0.1)
        return part

    parts = fan_out(
        range(5),
        {"a": slow, "b": slow},
        ahead=9,
        lost=_never,
        late=lambda name, other: late.append(name),
        patience_s=30,
    )
    assert list(parts) == list(range(5))
    assert not late


def test_two_that_are_lost_with_a_late_part_are_enough():
    hung, released = threading.Event(), threading.Event()

    def hangs(part: int) -> int:
        hung.set()
        released.wait()
        return part

    def dies_with_the_late_one(part: int) -> int:
        hung.wait()
        if part == 0:
            raise LostError("its power is gone")
        return part

    lost: list[str] = []
    workers: dict[str, Worker] = {"hangs": hangs}
    workers |= {"a": dies_with_the_late_one, "b": dies_with_the_late_one}
    with pytest.raises(DeadlineError, match=r"(a and then b|b and then a) were lost with the same"):
        list(
            fan_out(
                range(6),
                workers,
                ahead=9,
                lost=lambda name, error: lost.append(name),
                patience_s=0.05,
            )
        )
    assert sorted(lost) == ["a", "b"]
    released.set()


def test_a_part_that_takes_two_workers_down_is_tried_on_no_third():
    calls: list[str] = []

    def worker(name: str) -> Worker:
        def call(part: int) -> int:
            calls.append(name)
            if part == 1:
                raise LostError("killed")
            return part

        return call

    with pytest.raises(DeadlineError, match=r"were lost with the same part \(2 of 3\): killed"):
        run([0, 1, 2], {name: worker(name) for name in "abcd"}, ahead=1)
    assert 2 <= len(calls) <= 4


def test_without_workers_the_rest_is_counted():
    with pytest.raises(DeadlineError, match="all devices were lost; 1 of 2 parts"):
        run([1, 2], {"a": Dying(1)})


def test_a_progress_that_fails_ends_all():
    def done(part: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        list(fan_out([1], {"a": Dying(None)}, ahead=1, lost=_never, done=done))


@pytest.mark.parametrize(
    ("error", "said"),
    [(BackendError("not finite"), "a: not finite"), (ContextLengthError(9, 8), "the prompt has 9")],
)
def test_an_error_ends_all_and_says_where_it_was(error: EdgeError, said: str):
    def fails(part: int) -> int:
        raise error

    with pytest.raises(type(error), match=said):
        run([1, 2], {"a": fails})
