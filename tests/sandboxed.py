"""Run a command under the system call filter of a systemd unit: sandboxed.py UNIT COMMAND..."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pyseccomp


def members(name: str) -> set[str]:
    """System calls of one of systemd's sets, e.g. ``@system-service``."""
    listing = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    ).stdout
    found: set[str] = set()
    for line in map(str.strip, listing.splitlines()[1:]):
        if line and not line.startswith("#"):
            found |= members(line) if line.startswith("@") else {line}
    return found


def allowed(unit: Path) -> set[str]:
    """What the lines ``SystemCallFilter=`` leave, in order; systemd.exec(5)."""
    calls: set[str] = set()
    for inverted, names in re.findall(
        r"^SystemCallFilter=(~?)(.*)$", unit.read_text(), re.MULTILINE
    ):
        for name in names.split():
            named = members(name) if name.startswith("@") else {name}
            calls = calls - named if inverted else calls | named
    # An allow list always has these.
    return calls | members("@default") | {"execve", "exit", "exit_group"}


def main(unit: str, *command: str) -> None:
    """Load the filter and become the command."""
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in allowed(Path(unit)):
        try:
            rules.add_rule(pyseccomp.ALLOW, name)
        except (OSError, RuntimeError):
            continue  # a call of another architecture
    rules.load()  # no new privileges from here on
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
