"""Refuses numbers that no manifest may have, alone or together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.errors import BundleError
from edge.model.check import layer_faults

if TYPE_CHECKING:
    from edge.model.spec import ModelSpec

    from .manifest import DraftHead, Manifest


def check_fit(manifest: Manifest, where: str) -> None:
    """Refuse numbers that are in range but contradict each other.

    Raises:
        BundleError: some do; the message names the contradiction.
    """
    model = manifest.model
    ids = [*manifest.tokens.eos, *([] if manifest.tokens.bos is None else [manifest.tokens.bos])]
    wrong = [] if manifest.head is None else _head_faults(manifest.head, model)
    wrong += [*layer_faults(model), *_rope_faults(model)]
    wrong += [
        text
        for is_wrong, text in (
            (manifest.kv_capacity > manifest.rope_positions, "kv_capacity exceeds rope_positions"),
            (max(ids) >= model.vocab_size, "the id of bos or eos exceeds vocab_size"),
            *_task_faults(manifest),
            (
                manifest.kv_cache is not None
                and len(manifest.kv_cache.score_errors) != model.num_layers,
                "kv_cache has not one of score_errors for each layer",
            ),
            (
                manifest.kv_cache is not None
                and not set(manifest.kv_cache.float_layers) < set(range(model.num_layers)),
                "kv_cache leaves no layer in 8 bits, or names one that is not there",
            ),
        )
        if is_wrong
    ]
    if wrong:
        raise BundleError(
            f"{where} contradicts itself: {'; '.join(wrong)}; export the bundle again"
        )


def _rope_faults(model: ModelSpec) -> list[str]:
    """Return messages for RoPE scalings whose numbers contradict each other."""
    faults = []
    for rope in model.ropes:
        if rope.kind in ("llama3", "yarn") and not rope.original_max_positions:
            faults.append(f"rope of kind {rope.kind} has no original_max_positions")
        if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
            faults.append("rope's low_freq_factor is not below its high_freq_factor")
    return faults


def _task_faults(manifest: Manifest) -> list[tuple[bool, str]]:
    """Return pairs: whether the task contradicts another field, and the message for it."""
    task, embedding, reranking = manifest.model.task, manifest.embedding, manifest.reranking
    ids = () if embedding is None else embedding.append
    if reranking is not None:
        ids = (reranking.yes, reranking.no)
    least = 1 if embedding is None else embedding.least_dimensions or 1
    default = None if embedding is None else embedding.default_prompt
    return [
        ((embedding is not None) != (task == "embed"), "embedding does not fit the task"),
        ((reranking is not None) != (task == "rerank"), "reranking does not fit the task"),
        (task != "generate" and manifest.head is not None, "only what generates has a head"),
        (any(id_ >= manifest.model.vocab_size for id_ in ids), "an id of its task is no token"),
        (least > manifest.model.hidden_size, "least_dimensions exceeds hidden_size"),
        (
            default is not None and embedding is not None and default not in embedding.prompts,
            "default_prompt is none of the prompts",
        ),
    ]


def _head_faults(head: DraftHead, model: ModelSpec) -> list[str]:
    """Return messages for contradictions of a head with itself or its model."""
    own = head.model
    return [
        *(f"the head: {text}" for text in [*layer_faults(own), *_rope_faults(own)]),
        *(
            f"the head {text}"
            for is_wrong, text in (
                (own.num_layers != 1, f"has {own.num_layers} layers"),
                (own.hidden_size != model.hidden_size, "has another hidden_size than the model"),
                (own.vocab_size > model.vocab_size, "has more tokens than the model"),
                (
                    head.vocabulary is None and own.vocab_size != model.vocab_size,
                    "guesses some tokens and does not say which",
                ),
                (max(head.layers) > model.num_layers, "reads a layer that the model does not have"),
            )
            if is_wrong
        ),
    ]


def head_files(head: DraftHead) -> list[str]:
    """Return the names of a head's files."""
    named = [] if head.vocabulary is None else [head.vocabulary]
    return [head.graphs.decoder, head.graphs.cpu, *named]
