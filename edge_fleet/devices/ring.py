"""Places keys on devices by consistent hashing: a lost device moves only its own share."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator

_POINTS = 128
"""Places of each device on the ring; with these, shares differ by a few tenths at most."""


class Ring:
    """Devices on a ring, by name.

    Args:
        names: the devices.
    """

    def __init__(self, names: Iterable[str]) -> None:
        points = [(_place(f"{name}#{i}"), name) for name in names for i in range(_POINTS)]
        points.sort()
        self._places = [place for place, _ in points]
        self._names = [name for _, name in points]
        self._num_names = len(set(self._names))

    def order(self, key: str) -> Iterator[str]:
        """Go through all devices: first the key's home, then whoever takes it where that is gone.

        Without some devices the others come in the same order.
        """
        seen: set[str] = set()
        start = bisect.bisect(self._places, _place(key))
        for i in range(len(self._names)):
            if len(seen) == self._num_names:
                return
            name = self._names[(start + i) % len(self._names)]
            if name not in seen:
                seen.add(name)
                yield name


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
