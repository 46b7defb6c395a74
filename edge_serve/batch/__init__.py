"""Answers a file of requests, in OpenAI's Batch format, here or by any server of OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import BatchResult, run_batch

__all__ = ["TIMEOUT_S", "WAIT_S", "BatchResult", "run_batch"]

WAIT_S = 600.0
"""Seconds for which a server that is gone or has no room is waited for."""
TIMEOUT_S = 3600.0
"""Seconds that one answer of a server may take where nobody says otherwise."""


def __getattr__(name: str) -> object:
    if name not in ("BatchResult", "run_batch"):
        raise AttributeError(f"module 'edge_serve.batch' has no attribute {name!r}")
    from . import run

    return getattr(run, name)
