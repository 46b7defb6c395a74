"""Runs work that takes a while in a thread, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")
_slow_executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="edge-grammar")


async def in_thread(work: Callable[[], _Result], *, slow: bool = False) -> _Result:
    """Run ``work`` in a thread and wait for its result.

    Args:
        work: what to run.
        slow: whether it may take seconds (a grammar is compiled) and must not hold up other work.
    """
    executor = _slow_executor if slow else None
    return await asyncio.get_running_loop().run_in_executor(executor, work)
