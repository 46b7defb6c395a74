"""When memory is given back to the system."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_serve.http import memory
from edge_serve.http.memory import Trimmer
from edge_serve.http.threads import LARGE_BYTES

MIB = 2**20


class Libc:
    """Counts calls."""

    def __init__(self) -> None:
        self.trims = 0

    def malloc_trim(self, pad: int) -> int:
        self.trims += 1
        return 1


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Libc:
    found = Libc()
    monkeypatch.setattr(memory, "_libc", found)
    monkeypatch.setattr(memory, "_has_trim", True)
    monkeypatch.setattr(memory, "_TRIM_AFTER_S", 0.001)
    monkeypatch.setattr(memory, "_LOOK_EVERY_S", 0.02)
    return found


async def settled(trimmer: Trimmer) -> None:
    """Wait until nothing is about to be looked at or trimmed, and has been."""
    while trimmer._looks or trimmer._waits:
        await asyncio.sleep(0.002)
    # Of one thread, so that this comes after what was begun.
    await asyncio.get_running_loop().run_in_executor(None, int)


def test_small_requests_that_add_up_are_trimmed_once_in_a_while(
    libc: Libc, monkeypatch: pytest.MonkeyPatch
):
    resident = 300 * MIB
    monkeypatch.setattr(memory, "read_rss_bytes", lambda: resident)

    async def requests(trimmer: Trimmer, num: int) -> None:
        for _ in range(num):
            trimmer.ended(200)
        await settled(trimmer)

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        nonlocal resident
        trimmer = Trimmer()
        await requests(trimmer, 1000)
        assert libc.trims == 1  # what opening the model left behind, too
        await requests(trimmer, 1000)
        assert libc.trims == 1  # the process has not grown
        resident += 100 * MIB
        await requests(trimmer, 1)
        assert libc.trims == 2

    asyncio.run(scenario())


def test_a_large_request_is_trimmed_at_once(libc: Libc, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_LOOK_EVERY_S", 60.0)

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        trimmer = Trimmer()
        for _ in range(3):
            trimmer.ended(LARGE_BYTES)
        await settled(trimmer)
        assert libc.trims == 1

    asyncio.run(scenario())
