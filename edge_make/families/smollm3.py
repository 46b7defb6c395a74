"""SmolLM3 (``SmolLM3ForCausalLM``): Llama's layers, every fourth of them without RoPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge.errors import CheckpointError

from .family import WINDOW, Family

_INTERVAL = 4  # also llama.cpp's, whose files do not state it


def without_rope(get: Callable[[str], Any], num_layers: int) -> list[int]:
    """Return the layers that positions do not turn.

    ``no_rope_layers`` lists a 0 for each of them, and a 1 for the others.

    Raises:
        CheckpointError: the list is not of zeros and ones, or too short.
    """
    turns = get("no_rope_layers")
    if turns is None:
        interval = get("no_rope_layer_interval")
        interval = _INTERVAL if interval is None else interval
        if not isinstance(interval, int) or interval < 1:
            raise CheckpointError(f"no_rope_layer_interval must be at least 1, found {interval!r}")
        return [i for i in range(num_layers) if (i + 1) % interval == 0]
    if (
        not isinstance(turns, list)
        or len(turns) < num_layers
        or any(each not in (0, 1) for each in turns)
    ):
        raise CheckpointError(
            f"no_rope_layers must have 0 or 1 for each of {num_layers} layers, found {turns!r:.80}"
        )
    return [i for i in range(num_layers) if not turns[i]]


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "SmolLM3Model",
    gguf_interleaves=True,
    default_theta=2_000_000.0,
    tied_by_default=True,
    without_rope=without_rope,
    reads=WINDOW | {"no_rope_layers", "no_rope_layer_interval"},
)
