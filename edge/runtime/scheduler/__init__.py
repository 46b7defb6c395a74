"""Many requests over the fixed slots of one backend."""

from __future__ import annotations

from .request import (
    Constraint,
    Drafter,
    FinishReason,
    Overflow,
    PrefixSource,
    Request,
    SchedulerStats,
    StoredPrefix,
    TokenEvent,
    Watcher,
)
from .scheduler import Scheduler
from .ticket import Ticket

__all__ = [
    "Constraint",
    "Drafter",
    "FinishReason",
    "Overflow",
    "PrefixSource",
    "Request",
    "Scheduler",
    "SchedulerStats",
    "StoredPrefix",
    "Ticket",
    "TokenEvent",
    "Watcher",
]
