"""Runs many requests on the fixed slots of one backend."""

from __future__ import annotations

from .request import Constraint, Overflow, PrefixSource, PutAway, Request, StoredPrefix
from .scheduler import Scheduler
from .sequence import SequenceState

__all__ = [
    "Constraint",
    "Overflow",
    "PrefixSource",
    "PutAway",
    "Request",
    "Scheduler",
    "SequenceState",
    "StoredPrefix",
]
