"""Work that takes a while runs beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")
_slow_executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="edge-grammar")


async def in_thread(work: Callable[[], _Result], *, slow: bool = False) -> _Result:
    """Run what takes a while beside the loop.

    Args:
        work: what to run.
        slow: it may take seconds (a grammar is compiled), so it must not hold up the rest.
    """
    executor = _slow_executor if slow else None
    return await asyncio.get_running_loop().run_in_executor(executor, work)
