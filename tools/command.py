"""Prints progress of scripts, and ends them with a line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from edge.errors import EdgeError


def say(text: str) -> None:
    """Print progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def run_main(main: Callable[[], None]) -> None:
    """Run a script; an `EdgeError` becomes a line and an exit code."""
    try:
        main()
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
