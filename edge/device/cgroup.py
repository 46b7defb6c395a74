"""Reads what the control groups of this process, of a container or a systemd unit, leave it.

``/proc/meminfo`` and the list of CPUs describe the whole machine. A group's limit holds for all
processes in it, and each of its parents may have a smaller one, so the whole chain counts:
=====  ==================================  ==============================================
v2     ``memory.max``, ``memory.high``     ``memory.current``, ``inactive_file`` of
                                           ``memory.stat``
v1     ``memory.limit_in_bytes``           ``memory.usage_in_bytes``, ``total_inactive_file``
v2     ``cpu.max``
v1     ``cpu.cfs_quota_us``, ``cpu.cfs_period_us``
=====  ==================================  ==============================================

Above ``memory.high`` processes are slowed until they are unusable, so it counts as a limit, too.
File pages that nobody uses any more count as free, as they do in ``MemAvailable``. A kernel may
have both versions mounted, with memory in one of them (systemd's hybrid hierarchy).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60  # v1 has no word for "unlimited", only a number near 2**63


class _Version(NamedTuple):
    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    quota: tuple[str, ...]


_V2 = _Version(("memory.max", "memory.high"), "memory.current", "inactive_file", ("cpu.max",))
_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
)


def read_room_bytes(root: Path = Path("/"), *, is_hard: bool = False) -> int | None:
    """Return how many bytes this process can take before it meets a limit; None without one.

    Args:
        root: directory that contains ``proc`` and ``sys``.
        is_hard: count only limits at which the kernel kills a process.
    """
    rooms = [
        room
        for version, group, top in _groups(root, "memory")
        for directory in _chain(group, top)
        if (room := _room(directory, version, is_hard)) is not None
    ]
    return min(rooms, default=None)


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs' whole time this process may use; None if nothing limits it.

    Args:
        root: directory that contains ``proc`` and ``sys``.
    """
    quotas = [
        quota
        for version, group, top in _groups(root, "cpu")
        for directory in _chain(group, top)
        if (quota := _quota(directory, version)) is not None
    ]
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[_Version, Path, Path]]:
    """Yield this process's groups of a controller, each with the root of its mount."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            paths[_V1] = path
        elif number == "0" and not controllers:
            paths[_V2] = path
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        before, after = fields.split(), rest.split()
        if len(before) < 5 or len(after) < 3:
            continue
        is_v1 = after[0] == "cgroup" and controller in after[2].split(",")
        version = _V1 if is_v1 else _V2 if after[0] == "cgroup2" else None
        if version is None or version not in paths:
            continue
        part, top = _unescape(before[3]), root / _unescape(before[4]).lstrip("/")
        below = paths[version].removeprefix(part.rstrip("/")).lstrip("/")
        inside = paths[version].startswith(part) and ".." not in Path(below).parts
        yield version, top / below if inside else top, top


def _chain(group: Path, top: Path) -> Iterator[Path]:
    yield group
    while group != top:
        group = group.parent
        yield group


def _room(group: Path, version: _Version, is_hard: bool) -> int | None:
    names = version.limits[:1] if is_hard else version.limits
    limits = [limit for name in names if (limit := _number(group / name)) is not None]
    usage = _number(group / version.usage)
    if usage is None or not limits or min(limits) >= _UNLIMITED:
        return None
    stat = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
    used = usage - (_parse(stat.get(version.reclaimable, "")) or 0)
    return max(0, min(limits) - max(0, used))


def _quota(group: Path, version: _Version) -> float | None:
    words = " ".join(line for name in version.quota for line in _lines(group / name)).split()
    numbers = [number for word in words if (number := _parse(word))]
    return numbers[0] / numbers[1] if len(numbers) == 2 else None


def _number(path: Path) -> int | None:
    """Read a number from a file; None for ``max``, or if there is no number."""
    return _parse("".join(_lines(path)))


def _parse(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:  # the file is missing, or the group has just ended
        return []


def _unescape(path: str) -> str:
    """Undo the escapes of spaces and backslashes in ``/proc/self/mountinfo``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
