"""Ports for programs that must be told theirs, and so cannot ask for port 0."""

import os
import socket
from collections.abc import Iterator

# Below 32768, whence Linux takes the ports of those who ask for none: one that nobody is
# given by accident stays free until its program listens. Each of pytest's workers has its own.
_EACH = 1_500
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_first, _start = 20_000 + _EACH * _worker, os.getpid() % _EACH  # not those of the last run
# Every third: the router of the endpoint takes the two after its own, too.
_untried: Iterator[int] = (_first + (_start + n) % _EACH for n in range(0, _EACH, 3))


def free_port() -> int:
    """A port that nobody listens on, and that was not given before."""
    for port in _untried:
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"all {_EACH} ports of this worker were given")
