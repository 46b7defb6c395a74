"""Names the tensors that a model's checkpoint has to have."""

from __future__ import annotations

from edge.bundle.linears import NormSpec, linears_and_norms, norm_layers
from edge.model.names import TOKEN_TABLE
from edge.model.spec import ModelSpec


def norm_sources(model: ModelSpec) -> dict[str, str]:
    """Return the HF name of every RMSNorm weight by its name in the graph."""
    return {norm.name: norm.source for norm in norm_layers(model)}


def expected_tensors(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return HF name and shape of every tensor of the model; linears are ``[out, in]``.

    ``lm_head.weight`` is absent if the embeddings are tied.
    """
    tensors: dict[str, tuple[int, ...]] = {}
    tensors[TOKEN_TABLE] = (model.vocab_size, model.hidden_size)
    for part in linears_and_norms(model):
        if isinstance(part, NormSpec):
            tensors[part.source] = (part.size,)
            continue
        for name, rows in zip(part.weights, part.rows, strict=True):
            tensors[name] = (rows, part.shape[0])
        for name, rows in zip(part.biases, part.rows, strict=bool(part.biases)):
            tensors[name] = (rows,)
    return tensors
