"""Memory of this process in bytes, and its GPU without a driver."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from edge.device import gpu, memory
from edge.device.gpu import Gpu, find_gpu
from edge.device.process import choose_num_threads
from edge_make.resident_memory import read_rss_bytes, read_rss_peak_bytes, reset_rss_peak


def test_the_peak_is_in_bytes_and_starts_anew():
    reset_rss_peak()  # where it may not, the peak is that since the start
    before = read_rss_peak_bytes()
    # Its own mapping: the heap may have this much lying free after other tests.
    with mmap.mmap(-1, 50_000_000) as block:
        block[:] = b"x" * len(block)
        assert read_rss_peak_bytes() >= before + 40_000_000
        resident = read_rss_bytes()
        assert resident is None or 50_000_000 < resident <= read_rss_peak_bytes()


def test_a_system_that_does_not_say_has_a_peak_since_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "read_kib", lambda path, key: None)
    assert read_rss_bytes() is None
    assert read_rss_peak_bytes() > 10_000_000


@pytest.mark.parametrize(
    ("cpus", "quota", "threads"),
    [
        (range(8), "max 100000", 0),  # the whole machine: ONNX Runtime knows its cores
        (range(8), "400000 100000", 0),
        (range(8), "250000 100000", 2),
        (range(8), "50000 100000", 1),
        ((0, 1, 2, 3), "max 100000", 2),  # both threads of two cores
        ((0, 2, 5), "max 100000", 3),
        ((0, 2, 5), "200000 100000", 2),
        ((6,), "200000 100000", 1),
    ],
)
def test_threads_are_as_many_as_the_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: Any, quota: str, threads: int
):
    """Of four cores with two threads each; some may be off in a power mode, or another group's."""
    system, group = tmp_path / "sys/devices/system/cpu", tmp_path / "sys/fs/cgroup/a"
    files = {system / "present": "0-3,4-7", group / "cpu.max": quota}
    files |= {tmp_path / "proc/self/cgroup": "0::/a"}
    mount = "30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
    files |= {tmp_path / "proc/self/mountinfo": mount}
    for cpu in range(8):
        first = cpu - cpu % 2
        files[system / f"cpu{cpu}/topology/thread_siblings_list"] = f"{first}-{first + 1}"
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
    assert choose_num_threads(tmp_path) == threads


class Driver:
    """``libcuda`` with one GPU; ``failing`` is the call that answers with an error."""

    def __init__(self, failing: str = "") -> None:
        self._failing = failing

    def __getattr__(self, call: str) -> Any:
        def answer(*arguments: Any) -> int:
            if call == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            if call == "cuDeviceGetAttribute":
                answers = {16: 8, 75: 8, 76: 7}
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = answers[arguments[1]]
            return 100 if call == self._failing else 0

        return answer


def test_a_gpu_is_named_by_the_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "load_driver", Driver)
    assert find_gpu() == Gpu("Orin", "8.7", num_sms=8)


@pytest.mark.parametrize(
    "call", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"]
)
def test_a_driver_that_fails_has_no_gpu(call: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "load_driver", lambda: Driver(call))
    assert find_gpu() is None


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(gpu, "load_driver", missing)
    assert find_gpu() is None
