"""Finds the decoder in the ``config.json`` of a model that reads pictures beside text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.errors import CheckpointError

IDEFICS3_TYPES = ("idefics3", "smolvlm")
"""``model_type`` of SmolVLM and of SmolVLM2, which have the layout of Idefics3."""
INTERNVL_TYPE = "internvl"
"""``model_type`` of InternVL3 and InternVL3.5 in transformers' layout."""
_DECODERS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OTHER_ARITHMETIC = ("qk_layer_norms", "rope_interleaved", "use_resampler")


def reads_pictures(config: Mapping[str, Any]) -> bool:
    """Whether the config is of a model with a vision encoder that can be exported."""
    return config.get("model_type") in (*IDEFICS3_TYPES, INTERNVL_TYPE)


def decoder_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config of the decoder alone, as if it had been published alone.

    Args:
        config: config of a model that `reads_pictures`.
        where: path for error messages.

    Raises:
        CheckpointError: there is no ``text_config``, or its arithmetic is not supported.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{where}: text_config must be an object, found {text!r}; copy the config.json of the "
            "original model"
        )
    intern = config["model_type"] == INTERNVL_TYPE
    kind = text.get("model_type", "qwen2" if intern else "llama")  # what transformers assumes
    if kind not in _DECODERS:
        raise CheckpointError(
            f"{where}: text_config: model_type {kind!r} is not supported; supported: "
            f"{', '.join(_DECODERS)}"
        )
    for key in _OTHER_ARITHMETIC:
        if text.get(key):
            raise CheckpointError(f"{where}: text_config: {key} is true, which is not supported")
    # transformers reads this key beside text_config, and takes its absence as false. InternVL's
    # checkpoints are of versions that read it in text_config.
    tied = config.get("tie_word_embeddings", intern and text.get("tie_word_embeddings", False))
    return {**text, "architectures": [_DECODERS[kind]], "tie_word_embeddings": tied}
