"""Defines `Family`, what tells one kind of decoder from another, and makes models of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import msgspec
from numpy.typing import NDArray

from edge.errors import CheckpointError
from edge.model.parts import Rope, only
from edge.model.spec import LayerRun, ModelSpec, RopeSpec, Task

from .config import Config
from .dense import Layers

WINDOW = frozenset({"sliding_window"})
"""For classes whose window counts only where ``use_sliding_window`` is true, which is refused."""

Change = Callable[[NDArray[Any]], NDArray[Any]]
"""Computes a weight of the graph from a float weight of the checkpoint, of the same shape."""


def _unscaled(config: Config) -> float:
    return 1.0


def _as_stored(*_: Any) -> dict[str, Change]:
    return {}


@dataclass(frozen=True)
class Family:
    """A family of decoders, in one file.

    Attributes:
        name: its name in manifests, and ``general.architecture`` of its GGUF files.
        model_class: its class with an lm_head in transformers.
        base_class: its class without one, which is enough for a model that embeds.
        layers: makes the parts of every layer.
        reads: keys that change the arithmetic, as `edge_make.model_config` lists them, and that
            the family reads, or that its class in transformers reads only beside one that is
            refused.
        defaults: what the class assumes for keys that a config leaves out.
        stream: factor on the residual stream of the graph; `decoder` has the eps of the norms
            follow, and ``weights`` everything else.
        weights: tells how weights change on their way into the graph, by HF name; those left out
            are taken as they are.
        gguf_weights: tells how to undo what llama.cpp's converter does to weights, by HF name.
    """

    name: str
    model_class: str
    base_class: str
    layers: Callable[[Config], Layers]
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    stream: Callable[[Config], float] = _unscaled
    weights: Callable[[Config, ModelSpec], Mapping[str, Change]] = _as_stored
    gguf_weights: Callable[[ModelSpec], Mapping[str, Change]] = _as_stored


@dataclass(frozen=True)
class Decoder:
    """A model, and how the weights of its checkpoint become those of its graph.

    Attributes:
        spec: the model.
        changes: changes of weights by HF name.
    """

    spec: ModelSpec
    changes: Mapping[str, Change]


def decoder(family: Family, config: Config, rope: RopeSpec, task: Task = "generate") -> Decoder:
    """Make a model of a family from its numbers.

    Raises:
        CheckpointError: a number is missing or makes no sense; the key is named.
    """
    layers = family.layers(config)
    runs = [LayerRun(len(list(same)), parts) for parts, same in groupby(layers)]
    spec = ModelSpec(
        architecture=family.name,
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        rms_norm_eps=config.number("rms_norm_eps") * family.stream(config) ** 2,
        max_position_embeddings=config.integer("max_position_embeddings"),
        ropes=(rope,) if any(only(parts, Rope) for parts in layers) else (),
        layers=tuple(runs),
        tied_embeddings=config.boolean("tie_word_embeddings"),
        task=task,
    )
    try:
        msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{config.where}: {error}; is the file damaged?") from error
    return Decoder(spec, family.weights(config, spec))
