"""Lists the decoder's fused linear layers and norms, and the checkpoint tensors of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge.model.names import FINAL_NORM, module_name
from edge.model.parts import Add, Attention, GatedMlp, Linear, Norm, Rope, unknown_part
from edge.model.spec import ModelSpec

ROTATION = "rotation"
"""Begins the name of the constant that rotates ``n`` input channels of a linear layer in the graph:
``rotation.n``."""


@dataclass(frozen=True)
class LinearSpec:
    """A fused linear layer of the graph and the checkpoint tensors it is made of.

    Attributes:
        name: e.g. ``layers.0.qkv``.
        weights: HF names of ``[out, in]`` matrices, stacked along ``out``.
        biases: HF names of their biases, or empty.
        shape: ``[in, out]`` of the fused matrix.
        rows: ``out`` of each of the matrices.
    """

    name: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    shape: tuple[int, int]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class NormSpec:
    """An RMSNorm: its name in the graph, the HF name of its weight, and that weight's size."""

    name: str
    source: str
    size: int


def linear_layers(model: ModelSpec) -> list[LinearSpec]:
    """List every linear layer in the order in which the graph runs them.

    The lm_head is the last. It has two rows if the model judges documents, and is absent if the
    model embeds.
    """
    return [part for part in linears_and_norms(model) if isinstance(part, LinearSpec)]


def norm_layers(model: ModelSpec) -> list[NormSpec]:
    """List every RMSNorm in the order in which the graph runs them."""
    return [part for part in linears_and_norms(model) if isinstance(part, NormSpec)]


def linears_and_norms(model: ModelSpec) -> Iterator[LinearSpec | NormSpec]:
    """Yield the whole decoder, in the order of the graph."""
    for i, layer in model.each_layer():
        for part in layer:
            match part:
                case Norm(name=name, size=size):
                    yield NormSpec(f"layers.{i}.{name}", f"{module_name(i, name)}.weight", size)
                case Linear(name=name):
                    rows = {module_name(i, output): size for output, size in part.outputs}
                    yield fuse(f"layers.{i}.{name}", part.width, rows, has_bias=part.bias)
                case Rope() | Attention() | GatedMlp() | Add():
                    pass  # it has no weights
                case _:
                    unknown_part(part)
    hidden = model.hidden_size
    yield NormSpec("final_norm", FINAL_NORM, hidden)
    if model.task == "embed":
        return
    if model.task == "rerank":
        yield fuse("lm_head", hidden, {"lm_head": 2})
        return
    head = "model.embed_tokens" if model.tied_embeddings else "lm_head"
    yield fuse("lm_head", hidden, {head: model.vocab_size})


def fuse(name: str, width: int, rows: dict[str, int], *, has_bias: bool = False) -> LinearSpec:
    """Fuse modules that share one input of ``width``; ``rows`` has their outputs by HF name."""
    return LinearSpec(
        name=name,
        weights=tuple(f"{module}.weight" for module in rows),
        biases=tuple(f"{module}.bias" for module in rows) if has_bias else (),
        shape=(width, sum(rows.values())),
        rows=tuple(rows.values()),
    )
