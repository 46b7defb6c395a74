"""SmolLM3 (``SmolLM3ForCausalLM``): Llama's layers, every fourth of them without RoPE."""

from __future__ import annotations

from .config import Config
from .dense import Layers, dense
from .family import WINDOW, Family
from .llama import neighbours_to_halves

_INTERVAL = 4  # also llama.cpp's, whose files do not state it


def layers(config: Config) -> Layers:
    """Make Llama's layers."""
    return dense(config, without_rope=_without_rope(config))


def _without_rope(config: Config) -> list[int]:
    """Return the layers that positions do not turn.

    ``no_rope_layers`` lists a 0 for each of them, and a 1 for the others.

    Raises:
        CheckpointError: the list is not of zeros and ones, or too short.
    """
    num_layers, turns = config.integer("num_hidden_layers"), config.get("no_rope_layers")
    if turns is None:
        interval = config.integer("no_rope_layer_interval", _INTERVAL)
        return [i for i in range(num_layers) if (i + 1) % interval == 0]
    if (
        not isinstance(turns, list)
        or len(turns) < num_layers
        or any(each not in (0, 1) for each in turns)
    ):
        raise config.error(
            "no_rope_layers",
            f"must have 0 or 1 for each of {num_layers} layers, found {turns!r:.80}",
        )
    return [i for i in range(num_layers) if not turns[i]]


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "SmolLM3Model",
    layers,
    reads=WINDOW | {"no_rope_layers", "no_rope_layer_interval"},
    defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    gguf_weights=neighbours_to_halves,
)
