"""Takes a trial back if the roll-out that began it dies, even by ``kill -9``.

The roll-out starts this process before it moves the link, and keeps the other end of its standard
input. If that end closes without a word, nobody is left to judge the new bundle.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge.errors import ConfigError, EdgeError

from .journal import Place, take_back

_WORD = b"done"
_PATIENCE_S = 30.0


@contextmanager
def guarded(place: Place, reload: str | None) -> Iterator[None]:
    """Have a trial taken back if this process ends within the block.

    If an exception leaves the block, the caller acts upon it first: the guard then only checks
    whether something is still on trial.
    """
    arguments = [sys.executable, "-m", "edge_fleet.rollout.guard", str(place.link), reload or ""]
    arguments += [] if place.staging is None else [str(place.staging)]
    # It has a session of its own, so that a signal to the roll-out's terminal does not end it.
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdin is not None
    try:
        yield
        process.stdin.write(_WORD)
    finally:
        with suppress(BrokenPipeError):  # somebody ended it; nothing depends on it any more
            process.stdin.close()
        # If the word did not arrive, it waits for the lock that the caller still holds.
        process.kill()
        process.wait()


def main(link: str, reload: str, staging: str | None = None) -> int:
    """Wait for the end of standard input, and act if it came without the word."""
    if sys.stdin.buffer.read() == _WORD:
        return 0
    place = Place(Path(link), None if staging is None else Path(staging))
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with place.locked():
                take_back(place, place.read(), reload or None)
            return 0
        except ConfigError:
            # The kernel may not have released the dead process's lock yet.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except EdgeError as error:
        print(f"edge-llm: error: {error}", file=sys.stderr)  # noqa: T201 - nobody else is left
        sys.exit(error.exit_code)
