"""Lets a sequence outgrow its slot: old rows are dropped, and the others move up.

The first tokens stay, since attention relies on them whatever they say (attention sinks, arXiv
2309.17453), and so do the newest. The rows in between are dropped. The rows that stay are not
computed again: their keys are rotated to their new positions. So they keep information from
dropped tokens, and a slide costs a copy instead of a prefill.
"""

from __future__ import annotations

from edge.bundle.rope import inverse_frequencies, turn
from edge.errors import ConfigError
from edge.model.cache import cache_tensors, check_cache
from edge.model.parts import Rope, only
from edge.model.slot_rows import SlotRows
from edge.model.spec import ModelSpec

NUM_SINKS = 4


class SlidingWindow:
    """Keeps the first tokens and the newest ones, as an `edge.runtime.scheduler.Overflow`.

    Each slide drops half of the rows after the sinks, so that the next slide is far off.

    Args:
        model: the bundle's model; its RoPE and cache are used.
        num_sinks: first tokens that always stay.

    Raises:
        ConfigError: there is no sink, without which a model produces nonsense at once; or a cache
            of the model cannot be cut.
    """

    def __init__(self, model: ModelSpec, num_sinks: int = NUM_SINKS) -> None:
        if num_sinks < 1:
            raise ConfigError(f"a sliding window needs at least 1 sink token, not {num_sinks}")
        self._num_sinks = num_sinks
        check_cache(cache_tensors(model, "fp32"), "can_cut", "a sliding window")
        self._ropes = {
            f"{layer}.key": inverse_frequencies(model.ropes[rope.table], rope.dims)
            for layer, parts in model.each_layer()
            for rope in only(parts, Rope)
        }

    def slide(self, rows: SlotRows, ids: list[int]) -> tuple[SlotRows, list[int]]:
        """Drop the middle of a full slot, as `edge.runtime.scheduler.Overflow` describes.

        Args:
            rows: at least two rows.
            ids: the token of each row.

        Returns:
            The rows that stay, in the types of ``rows``, and the token of each.
        """
        length = len(ids)
        sinks = min(self._num_sinks, (length - 1) // 2)
        dropped = max((length - sinks) // 2, 1)
        return self.cut(rows, sinks, dropped), ids[:sinks] + ids[sinks + dropped :]

    def cut(self, rows: SlotRows, start: int, count: int) -> SlotRows:
        """Drop ``count`` rows from ``start`` on; the keys of those after them are turned."""
        kept = rows.without(start, count)
        for name, frequencies in self._ropes.items():  # one by one: float64 of all would be large
            keys = kept[name][:, start:, : 2 * len(frequencies)]
            keys[...] = turn(keys, frequencies, -count)
        return kept
