from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import limited_child
from edge.errors import ResourceError
from edge.limited_child import ChildError, LimitedChild, LimitError, Limits
from tests.edge.child_tasks import ATTEMPTS

LIMITS = Limits(cpu_s=0.3, memory_bytes=256 << 20, answer_bytes=1 << 22)


@pytest.fixture(scope="module")
def child():
    with LimitedChild("tests.edge.child_tasks:work", LIMITS) as opened:
        yield opened


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=100))
def test_bytes_come_back_as_they_were(child, data):
    assert child.ask(b"echo " + data) == data


def test_long_tasks_and_answers_do_not_block_each_other(child):
    data = os.urandom(3 << 20)  # of many times a pipe's size
    assert child.ask(b"echo " + data) == data


def test_one_child_does_many_tasks_of_many_threads(child):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: child.ask(b"echo %d" % n), range(200)))
        assert answers == [b"%d" % n for n in range(200)]
        assert len(set(pool.map(lambda _: child.ask(b"pid"), range(20)))) == 1


TOO_MUCH = [
    b"spin",
    b"compute %g" % (1.5 * LIMITS.cpu_s),
    b"take %d" % LIMITS.memory_bytes,
    b"long %d" % (LIMITS.answer_bytes + 1),
    b"abort",
]


@pytest.mark.parametrize("task", TOO_MUCH)
def test_what_passes_a_limit_ends_the_child_and_the_next_task_has_another(child, task):
    before = child.ask(b"pid")
    before_s = time.monotonic()
    with pytest.raises(LimitError):
        child.ask(task)
    assert time.monotonic() - before_s < 10
    after = child.ask(b"pid")
    assert after != before
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)


def test_the_time_of_a_child_ends_though_its_parent_blocks_the_signal():
    """It inherits the mask of the thread that starts it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    try:
        with LimitedChild("tests.edge.child_tasks:work", LIMITS) as child:
            assert child.ask(b"compute 0.01") == b"done"
            with pytest.raises(LimitError):
                child.ask(b"compute %g" % (1.5 * LIMITS.cpu_s))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.slow
def test_a_child_that_stands_still_is_ended(child, monkeypatch):
    child.ask(b"pid")
    with monkeypatch.context() as patch:
        patch.setattr(limited_child, "_MIN_WALL_S", 1.0)
        patch.setattr(limited_child, "_WALL_FACTOR", 1)
        with pytest.raises(LimitError):
            child.ask(b"sleep 60")
        # A task cannot stop its child, so whoever did is outside, as is a machine that is too busy.
        for task in (b"pid", b"echo " + bytes(1 << 20)):
            os.kill(int(child.ask(b"pid")), signal.SIGSTOP)
            with pytest.raises(ResourceError, match=r"had 0\.\d+ s of CPU time in 1 s.* too busy"):
                child.ask(task)
    assert child.ask(b"echo a") == b"a"


def test_a_child_that_gets_little_of_a_core_is_waited_for(child, monkeypatch):
    """It is let go on for a moment at a time, as by a machine that does other things first."""
    monkeypatch.setattr(limited_child, "_MIN_WALL_S", 0.5)
    monkeypatch.setattr(limited_child, "_WALL_FACTOR", 1)
    pid, done = int(child.ask(b"pid")), threading.Event()

    def hold() -> None:
        while not done.wait(0.05):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(pid, signal.SIGCONT)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        before_s = time.monotonic()
        assert child.ask(b"compute 0.2") == b"done"
        assert time.monotonic() - before_s > 0.5
    finally:
        done.set()
        holder.join()


def test_time_is_counted_by_task(child):
    before = child.ask(b"pid")
    for _ in range(4):
        child.ask(b"sleep 0.12")  # sleeping costs no CPU time
    assert child.ask(b"pid") == before


def test_other_ends_are_told_from_limits(child):
    with pytest.raises(ChildError, match="ValueError: what"):
        child.ask(b"raise what")
    with pytest.raises(ChildError, match="exit code 3"):
        child.ask(b"exit")
    assert child.ask(b"print") == b"done"
    with pytest.raises(ChildError, match="No module named"):
        LimitedChild("tests.edge.nothing:work", LIMITS).ask(b"")


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_task_opens_nothing(child, attempt):
    assert child.ask(b"attempt " + attempt.encode()) == b"PermissionError"


UNCONFINED_START = limited_child._START.replace(
    "import json, sys;",
    "import json, os, sys; "
    "os.uname = lambda: os.uname_result(('Linux', 'a', 'b', 'c', 'riscv64'));",
)


def test_where_the_kernel_confines_nobody_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(limited_child, "_START", UNCONFINED_START)
    monkeypatch.setattr(limited_child, "_warned", [])
    for _ in range(2):
        with LimitedChild("tests.edge.child_tasks:work", LIMITS) as child:
            assert child.ask(b"echo a") == b"a"
            assert child.ask(b"attempt list") == b"done"
            with pytest.raises(LimitError):
                child.ask(b"spin")
    assert len(caplog.records) == 1
    assert "limits on time and memory only: only Linux on x86_64 or aarch64" in caplog.text
    child = LimitedChild("tests.edge.child_tasks:work", replace(LIMITS, confined=True))
    with child, pytest.raises(ResourceError, match="is not run here: only Linux on"):
        child.ask(b"echo a")


@pytest.mark.slow
def test_the_kernel_ends_a_child_that_puts_its_timer_off(monkeypatch):
    """Whether or not anybody is left who would: its parent may have been killed."""
    limits = replace(LIMITS, tasks=1)
    monkeypatch.setattr(limited_child, "_MIN_WALL_S", 90.0)
    ends: list[int | None] = []
    explain = LimitedChild._explain

    def note(process, clock):
        ends.append(process.wait())
        explain(process, clock)

    monkeypatch.setattr(LimitedChild, "_explain", staticmethod(note))
    with LimitedChild("tests.edge.child_tasks:work", limits) as child, pytest.raises(LimitError):
        child.ask(b"put_off")
    assert limits.life_s == 2
    assert ends == [-signal.SIGKILL]  # nobody here had ended it by then


@pytest.mark.slow
def test_a_child_whose_life_is_nearly_over_is_replaced_between_two_tasks():
    limits = replace(LIMITS, cpu_s=1.0, tasks=1)  # two seconds, of which a task may have one
    with LimitedChild("tests.edge.child_tasks:work", limits) as child:
        pids = {child.ask(b"pid")}
        for _ in range(8):
            assert child.ask(b"compute 0.4") == b"done"
            pids.add(child.ask(b"pid"))
    assert 2 <= len(pids) <= 8


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(ResourceError, match="cannot start a process"):
        LimitedChild("tests.edge.child_tasks:work", LIMITS).ask(b"echo")


def test_the_child_ends_with_its_owner():
    child = LimitedChild("tests.edge.child_tasks:work", LIMITS)
    pid = int(child.ask(b"pid"))
    del child
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_fork_gets_a_child_of_its_own(child):
    ours = child.ask(b"pid")
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has threads
        fork = os.fork()
    if fork == 0:
        try:
            os.write(writer, child.ask(b"pid"))
            child.close()
        finally:
            os._exit(0)
    os.close(writer)
    theirs = os.read(reader, 100)
    os.close(reader)
    os.waitpid(fork, 0)
    assert theirs.isdigit()
    assert theirs != ours
    assert child.ask(b"pid") == ours
