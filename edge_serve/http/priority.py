"""Reads the header ``Priority`` (RFC 9218), by which a client lets others go first."""

from __future__ import annotations

import re
from collections.abc import Iterable

USUAL_URGENCY = 3
"""The urgency of a request that names none; RFC 9218, section 4.1."""
BACKGROUND = "u=7"
"""The header for work that nobody waits for."""

_URGENCY = re.compile(r"[0-7]")


def priority_of(headers: Iterable[str]) -> int:
    """Return the scheduler's priority of a request: 0, or up to 4 to let others go first.

    An urgency above the usual one counts as the usual one: browsers send it with every click, and
    no client may overtake another. A malformed header counts as absent, as the standard demands.

    Args:
        headers: values of all headers of this name, in their order.
    """
    urgency = USUAL_URGENCY
    for item in ",".join(headers).split(","):
        key, equals, value = item.partition(";")[0].strip().partition("=")
        if key == "u" and equals and _URGENCY.fullmatch(value):
            urgency = int(value)  # if there are two, the last one counts (RFC 8941)
    return max(urgency - USUAL_URGENCY, 0)
