"""Turns TensorRT's nested phases into one fraction: how far a build is."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from edge_make.progress import Progress

STEP = "build"


@dataclass
class _Phase:
    parent: str | None
    num_steps: int
    share: float  # of the whole build
    done: float = 0.0  # of the phase itself


class PhaseTree:
    """Adds up phases: a phase fills one step of its parent. TensorRT calls from several threads.

    Args:
        progress: called after every event with the fraction of `STEP` and, as its detail, the
            phase; the fraction never falls.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self._reached = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """Note that a phase begins."""
        with self._lock:
            above = self._phases.get(parent) if parent else None
            share = above.share / max(above.num_steps, 1) if above else 1.0
            self._phases[name] = _Phase(parent, num_steps, share)
            self._tell(name)

    def step(self, name: str, step: int) -> None:
        """Note that a phase has completed its step number ``step``, counted from 0."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min((step + 1) / max(phase.num_steps, 1), 1.0)
                self._tell(name)

    def finish(self, name: str) -> None:
        """Note that a phase is over."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._reached = 1.0
            self._tell(name)

    def _tell(self, name: str) -> None:
        fraction = sum(phase.done * phase.share for phase in self._phases.values())
        self._reached = min(max(self._reached, fraction), 1.0)
        self._progress(STEP, self._reached, 1.0, "", name)
