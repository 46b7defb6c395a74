"""Defines how a long step reports its progress: one callback for runtime, exporter and builder.

The verbs of the command line pass the callback that shows it (`edge_lab.cli.progress`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A callback, called before a step's first piece of work and after each piece.

    ``done`` begins at 0, or at what an earlier run has left, and reaches ``total`` once, at the
    end. Steps may take turns.
    """

    def __call__(
        self, step: str, done: float, total: float, unit: str = "", detail: str = "", /
    ) -> None:
        """Take note of a step's progress.

        Args:
            step: name of the step, e.g. ``quantize``.
            done: how much of it.
            total: how much there is.
            unit: the things counted, in the plural, e.g. ``weights``; empty for a fraction.
            detail: remark on the current part of the step.
        """
        ...


def silent(step: str, done: float, total: float, unit: str = "", detail: str = "") -> None:
    """Show nothing."""


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Return the same callback, with ``prefix`` before every step's name."""

    def report(step: str, done: float, total: float, unit: str = "", detail: str = "") -> None:
        progress(f"{prefix}{step}", done, total, unit, detail)

    return report


@contextmanager
def uncounted(progress: Progress, step: str) -> Iterator[None]:
    """Report a step of which only the beginning and the end are known."""
    progress(step, 0, 1)
    yield
    progress(step, 1, 1)
