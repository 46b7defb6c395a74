"""Real control groups with a limit of memory, in whichever version has memory here."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Version 1, then 2: where groups are, their limit, and files of the most used and of kills.
_VERSIONS = (
    ("memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
    ("", "memory.max", "memory.peak", "memory.events"),
)
_numbers = itertools.count()


@dataclass(frozen=True)
class Group:
    """A control group.

    Attributes:
        path: its directory.
    """

    path: Path
    _peak: str
    _events: str

    def command(self, *arguments: str) -> list[str]:
        """A command that runs another in this group; its children are never outside."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.path), *arguments]

    @property
    def peak_bytes(self) -> int:
        """The most that was used, files in memory included."""
        return int((self.path / self._peak).read_text())

    @property
    def num_killed(self) -> int:
        """Processes that the kernel ended for want of memory."""
        found = re.search(r"^oom_kill (\d+)$", (self.path / self._events).read_text(), re.MULTILINE)
        assert found
        return int(found[1])


@contextlib.contextmanager
def limited_group(limit: int) -> Iterator[Group]:
    """Make a group with a limit in bytes; the test is skipped where none can be made."""
    name = f"edge-llm-test-{os.getpid()}-{next(_numbers)}"
    for parent, file, peak, events in _VERSIONS:
        path = Path("/sys/fs/cgroup") / parent / name
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if not (path / file).exists():
                continue
            (path / file).write_text(str(limit))
            yield Group(path, peak, events)
            return
        finally:
            _remove(path)
    pytest.skip("no memory control group can be made here")


def _remove(path: Path) -> None:
    """End what is left in a group, such as children of a process that was killed, and remove it."""
    for _ in range(200):
        for process in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        with contextlib.suppress(OSError):  # the last process may take a moment to go
            path.rmdir()
            return
        time.sleep(0.05)
    path.rmdir()
