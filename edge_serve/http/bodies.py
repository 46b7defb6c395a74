"""Limits the bytes of unfinished request bodies that all clients have together."""

from __future__ import annotations

from collections import Counter

from .errors import APIError

FREE_BYTES = 16 * 2**10
"""Bytes of each body that do not count, so that small requests pass even if the budget is full."""
_SHARES = 4


class BodyBudget:
    """Counts bodies from their first byte until their requests have ended.

    One client may have a quarter of the budget, or one body.

    Args:
        limit_bytes: the most bytes of all bodies.
        max_body_bytes: the most bytes of one body.
    """

    def __init__(self, limit_bytes: int, max_body_bytes: int) -> None:
        self._limit = limit_bytes
        self._share = max(limit_bytes // _SHARES, max_body_bytes)
        self._by_client: Counter[str] = Counter()
        self._total = 0

    def account(self, client: str) -> BodyAccount:
        """Open the account of one request of this client."""
        return BodyAccount(self, client)

    def _check(self, client: str, more: int) -> None:
        used = self._by_client[client]
        if self._total + more <= self._limit and used + more <= self._share:
            return
        whose = "of this client" if used + more > self._share else "of all clients"
        raise APIError(
            429,
            "bodies_full",
            f"the requests {whose} that are under way have {max(used, self._total)} bytes of "
            "bodies, and there is no room for this one; wait for their answers",
            retry_after_s=1,
        )

    def _add(self, client: str, num_bytes: int) -> None:
        self._total += num_bytes
        self._by_client[client] += num_bytes
        if not self._by_client[client]:
            del self._by_client[client]


class BodyAccount:
    """The bytes of one request in the budget; made by `BodyBudget.account`."""

    def __init__(self, budget: BodyBudget, client: str) -> None:
        self._budget = budget
        self._client = client
        self._taken = 0

    def check(self, num_bytes: int) -> None:
        """Refuse a body of this length before it is read, if there is no room for it now.

        Raises:
            APIError: 429, there is no room for it.
        """
        self._budget._check(self._client, max(0, num_bytes - FREE_BYTES) - self._taken)

    def grow_to(self, num_bytes: int) -> None:
        """Count that this many bytes of the body have arrived.

        Raises:
            APIError: 429, there is no room for them.
        """
        more = max(0, num_bytes - FREE_BYTES) - self._taken
        if more > 0:
            self._budget._check(self._client, more)
            self._budget._add(self._client, more)
            self._taken += more

    def take(self, num_bytes: int) -> None:
        """Count bytes that are here already, whether or not there is room for them."""
        self._budget._add(self._client, num_bytes)
        self._taken += num_bytes

    def close(self) -> None:
        """Give everything back; the request has ended."""
        self._budget._add(self._client, -self._taken)
        self._taken = 0
