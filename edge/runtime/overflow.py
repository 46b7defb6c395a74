"""Lets a sequence outgrow its slot: old rows are dropped, and the others move up.

The first tokens stay, since attention relies on them whatever they say (attention sinks, arXiv
2309.17453), and so do the newest. The rows in between are dropped. The rows that stay are not
computed again: their keys are rotated to their new positions. So they keep information from
dropped tokens, and a slide costs a copy instead of a prefill.
"""

from __future__ import annotations

import numpy as np

from edge.backends import Floats
from edge.bundle.rope import inverse_frequencies, turn
from edge.errors import ConfigError
from edge.model.spec import ModelSpec

NUM_SINKS = 4


class SlidingWindow:
    """Keeps the first tokens and the newest ones, as an `edge.runtime.scheduler.Overflow`.

    Each slide drops half of the rows after the sinks, so that the next slide is far off.

    Args:
        model: the bundle's model; its RoPE and head size are used.
        num_sinks: first tokens that always stay.

    Raises:
        ConfigError: there is no sink; without one a model produces nonsense at once.
    """

    def __init__(self, model: ModelSpec, num_sinks: int = NUM_SINKS) -> None:
        if num_sinks < 1:
            raise ConfigError(f"a sliding window needs at least 1 sink token, not {num_sinks}")
        self._num_sinks = num_sinks
        self._frequencies = inverse_frequencies(model.rope, model.head_dim)

    def slide(self, rows: Floats, ids: list[int]) -> tuple[Floats, list[int]]:
        """Drop the middle of a full slot, as `edge.runtime.scheduler.Overflow` describes.

        Args:
            rows: ``[2 * layers, kv_heads, length, head_dim]``, at least two rows.
            ids: the token of each row.

        Returns:
            The rows that stay, in the type of ``rows``, and the token of each.
        """
        length = len(ids)
        sinks = min(self._num_sinks, (length - 1) // 2)
        dropped = max((length - sinks) // 2, 1)
        return self.cut(rows, sinks, dropped), ids[:sinks] + ids[sinks + dropped :]

    def cut(self, rows: Floats, start: int, count: int) -> Floats:
        """Drop ``count`` rows from ``start`` on; the keys of those after them are turned.

        Args:
            rows: ``[2 * layers, kv_heads, length, head_dim]``.
            start: the first row to drop.
            count: number of rows to drop.

        Returns:
            ``[2 * layers, kv_heads, length - count, head_dim]``, in the type of ``rows``.
        """
        kept = np.concatenate((rows[:, :, :start], rows[:, :, start + count :]), axis=2)
        for keys in kept[::2]:  # layer by layer, since float64 of all would be large
            keys[:, start:] = turn(keys[:, start:], self._frequencies, -count)
        return kept
