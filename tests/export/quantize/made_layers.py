"""Tiny models some of whose layers have other parts than their family's."""

from __future__ import annotations

import msgspec

from edge.model.parts import AnyPart, Rope
from edge.model.spec import LayerRun, ModelSpec
from export.sources.checkpoint import Checkpoint, Transformed


class OfOtherLayers(Transformed):
    """A checkpoint that is read as a model of these layers."""

    def __init__(self, checkpoint: Checkpoint, *layers: tuple[AnyPart, ...]) -> None:
        super().__init__(checkpoint)
        runs = tuple(LayerRun(1, layer) for layer in layers)
        self.spec: ModelSpec = msgspec.structs.replace(checkpoint.spec, layers=runs)


def without_rope(checkpoint: Checkpoint) -> OfOtherLayers:
    """A model of two layers; positions turn the heads of the first alone."""
    plain = tuple(part for part in checkpoint.spec.layer(1) if not isinstance(part, Rope))
    return OfOtherLayers(checkpoint, checkpoint.spec.layer(0), plain)
