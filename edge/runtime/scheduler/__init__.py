"""Runs many requests on the fixed slots of one backend.

Here: the queue and whose turn it is, slots and their rows, steps, drafts, and the thread that runs
them. It works on token ids: texts, templates and grammars reach it only as sinks and constraints.
"""

from __future__ import annotations

from .request import Constraint, Overflow, PrefixSource, Request, StoredPrefix, Suspended
from .scheduler import Scheduler
from .sequence import SequenceState

__all__ = [
    "Constraint",
    "Overflow",
    "PrefixSource",
    "Request",
    "Scheduler",
    "SequenceState",
    "StoredPrefix",
    "Suspended",
]
