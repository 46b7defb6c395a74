"""Finds a Jetson's power modes that need no reboot, changes to them and back.

A mode that switches off other parts of the GPU than the present one (``TPC_PG_MASK`` and the like
in ``/etc/nvpmodel.conf``) needs a reboot, for which nvpmodel asks. Such modes are left out, and
nvpmodel gets no answer. nvpmodel keeps a mode over a reboot, so the mode that was found is written
to a file before it is left.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.errors import ConfigError, DependencyError
from edge_lab.telemetry import read_power_mode, read_power_modes
from edge_make.target import write_durably

NVPMODEL = "nvpmodel"
_BLOCK = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s.*?(?=^\s*<|\Z)", re.MULTILINE | re.DOTALL)
_MASK = re.compile(r"^\s*\w+\s+(\w+_PG_MASK)\s+(\w+)", re.MULTILINE)
_TIMEOUT_S = 60.0


def modes_without_reboot(root: Path = Path("/")) -> dict[int, str]:
    """Return the power modes that can be set now without a reboot, the present one left out.

    Raises:
        DependencyError: this machine has no nvpmodel, or does not say which mode it is in.
    """
    names, now = read_power_modes(root), read_power_mode(root)
    present = next((number for number, name in names.items() if name == now), None)
    if present is None:
        raise DependencyError(
            "--power-modes needs nvpmodel, and /etc/nvpmodel.conf or the present mode cannot be "
            "read here; leave it out"
        )
    masks = _read_masks(root)
    return {
        number: name
        for number, name in names.items()
        if number != present and masks.get(number) == masks.get(present)
    }


def _read_masks(root: Path) -> dict[int, tuple[tuple[str, str], ...]]:
    text = (root / "etc/nvpmodel.conf").read_text("utf-8", "replace")
    return {int(b[1]): tuple(sorted(_MASK.findall(b[0]))) for b in _BLOCK.finditer(text)}


def check_rights() -> list[str]:
    """Find out how nvpmodel can be called as root.

    Returns:
        The words to put before its name.

    Raises:
        ConfigError: this user cannot, without a password.
    """
    if os.geteuid() == 0:
        return []
    try:
        subprocess.run(
            ["sudo", "-n", NVPMODEL, "-q"], check=True, capture_output=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            "--power-modes changes the power mode, which takes root; run sudo -v first, or leave "
            "it out"
        ) from error
    return ["sudo", "-n"]


def set_mode(before: list[str], number: int, root: Path = Path("/")) -> str | None:
    """Change the mode; return None if the machine is in it, else nvpmodel's message."""
    try:
        done = subprocess.run(
            [*before, NVPMODEL, "-m", str(number)],
            stdin=subprocess.DEVNULL,  # no reboot
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if read_power_mode(root) == read_power_modes(root).get(number, str(number)):
        return None
    lines = (done.stderr + done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


@contextmanager
def mode_restored(
    note: Path, before: list[str], say: Callable[[str], None], root: Path = Path("/")
) -> Iterator[None]:
    """Restore the mode that was found at the end, and first one that a killed run left in ``note``.

    Args:
        note: file that holds the number of the mode to go back to while another one is set.
        before: words before ``nvpmodel``, as `check_rights` returns them.
        say: called with a message if the mode cannot be restored.
        root: directory that holds ``etc`` and ``var``.
    """
    restore(note, before, say, root)
    names, now = read_power_modes(root), read_power_mode(root)
    number = next(number for number, name in names.items() if name == now)
    write_durably(note, str(number).encode())
    try:
        yield
    finally:
        restore(note, before, say, root)


def restore(
    note: Path, before: list[str], say: Callable[[str], None], root: Path = Path("/")
) -> None:
    """Set the mode that ``note`` names and remove the note; do nothing without one."""
    try:
        number = int(note.read_text())
    except (OSError, ValueError):
        return
    problem = set_mode(before, number, root)
    if problem is not None:
        say(f"the power mode was not restored ({problem}); run: sudo nvpmodel -m {number}")
        return
    note.unlink(missing_ok=True)
