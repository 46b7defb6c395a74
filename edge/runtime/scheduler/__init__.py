"""Runs many requests on the fixed slots of one backend."""

from __future__ import annotations

from .request import (
    Constraint,
    DraftContext,
    Drafter,
    DraftWorth,
    FinishReason,
    Overflow,
    PrefixSource,
    PutAway,
    Request,
    SchedulerStats,
    Sink,
    SlotState,
    StoredPrefix,
)
from .scheduler import Scheduler
from .sequence import SequenceState

__all__ = [
    "Constraint",
    "DraftContext",
    "DraftWorth",
    "Drafter",
    "FinishReason",
    "Overflow",
    "PrefixSource",
    "PutAway",
    "Request",
    "Scheduler",
    "SchedulerStats",
    "SequenceState",
    "Sink",
    "SlotState",
    "StoredPrefix",
]
