"""Finds tactics in TensorRT's log that it did not try, because too little GPU memory was free.

Depending on the release it logs a request with the memory available (whole MiB), a line that names
the tactic, or both: NVIDIA-ISAAC-ROS/isaac_ros_common#223 (10.3), ultralytics/ultralytics#17338 and
#17640.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from edge.bundle.engine_file import SkippedTactics

_REQUEST = re.compile(r"Tactic Device request: (\d+) ?MB Available: (\d+) ?MB")
_TACTIC = re.compile(r"Skipping tactic \d+ due to insuff?icient memory on requested size of (\d+)")
_MIB = 1 << 20
CURE = (
    "give up the page cache with: sync && echo 1 | sudo tee /proc/sys/vm/drop_caches, stop other "
    "programs, or give a smaller --workspace"
)


def skipped_tactics(log: Iterable[str]) -> SkippedTactics | None:
    """Count them; also find the largest request and the least memory that was available then.

    Returns:
        The count and sizes; None if no tactic was skipped.
    """
    requests: list[tuple[int, int]] = []
    sizes: list[int] = []
    for line in log:
        if request := _REQUEST.search(line):
            requests.append((int(request[1]) * _MIB, int(request[2]) * _MIB))
        if tactic := _TACTIC.search(line):
            size = int(tactic[1])
            sizes.append(size if size > _MIB else size * _MIB)  # some releases log MiB
    if not requests and not sizes:
        return None
    asked, available = zip(*requests, strict=True) if requests else ((), ())
    return SkippedTactics(
        count=max(len(requests), len(sizes)),
        largest_bytes=max((*asked, *sizes)),
        available_bytes=min(available, default=None),
    )
