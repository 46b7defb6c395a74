"""How a long step says how far it is: one callback for runtime, exporter and builder.

The verbs of the command line hand in what shows it (`edge.cli.progress`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called before a step's first piece of work and after each.

    ``done`` begins at 0, or at what an earlier run has left, and reaches ``total`` once, at the
    end. Steps may take turns.
    """

    def __call__(
        self, step: str, done: float, total: float, unit: str = "", detail: str = "", /
    ) -> None:
        """Take note.

        Args:
            step: what is being done, e.g. ``quantize``.
            done: how much of it.
            total: how much there is.
            unit: what is counted, in the plural, e.g. ``weights``; empty for a fraction.
            detail: what is going on within the step.
        """
        ...


def silent(step: str, done: float, total: float, unit: str = "", detail: str = "") -> None:
    """Show nothing."""


def prefixed(progress: Progress, prefix: str) -> Progress:
    """The same, with every step's name behind ``prefix``."""

    def report(step: str, done: float, total: float, unit: str = "", detail: str = "") -> None:
        progress(f"{prefix}{step}", done, total, unit, detail)

    return report


@contextmanager
def uncounted(progress: Progress, step: str) -> Iterator[None]:
    """A step of which nothing is known but when it begins and ends."""
    progress(step, 0, 1)
    yield
    progress(step, 1, 1)
