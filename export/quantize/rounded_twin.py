"""Runs the calibration text through the layers as they are rounded so far.

The inputs of a linear in the bundle carry the errors of all linears before it. So a decoder layer
is run here from one linear's inputs to the next one's. Each linear can then be rounded for the
inputs that it will get, and make up for the errors in them (`error_feedback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.utils import Extractor

from edge.bundle import io_spec
from edge.model.parts import Add, Layer, Linear, only
from edge.model.spec import ModelSpec
from export.sources.checkpoint import Checkpoint

from .calibration import LayerGraph, linear_taps, run_session
from .fed_linears import neighbours

Array = NDArray[np.float32]
_BEFORE = io_spec.INPUTS_EMBEDS


def twin_taps(layer: Layer) -> dict[str, str]:
    """Find what the float model must show of a layer if the rounded model runs, too.

    That is the inputs of its linears, and the residual stream within it, by the names of the adds.
    """
    return linear_taps(layer) | {add.name: add.name for add in only(layer, Add)[:-1]}


class RoundedTwin:
    """The layers of a model, each to be run linear by linear.

    Args:
        checkpoint: the model.
        seq_len: tokens of a sequence.
    """

    def __init__(self, checkpoint: Checkpoint, seq_len: int) -> None:
        self._model = checkpoint.spec
        self._stages = cache(lambda one: _Stages(one, seq_len))

    def layer(self, checkpoint: Checkpoint, index: int, hidden: Array) -> RoundedLayer:
        """Begin a layer.

        Args:
            checkpoint: the model with all factors folded in.
            index: number of the layer.
            hidden: hidden states before it, float32 ``[sequences, seq_len, hidden]``.
        """
        stages = self._stages(self._model.of_layer(index))
        feed = stages.fixed | stages.graph.weights(checkpoint, index)
        return RoundedLayer(stages, feed, hidden)


class RoundedLayer:
    """One decoder layer; its linears are rounded in their order, before the next one's inputs."""

    def __init__(self, stages: _Stages, feed: dict[str, NDArray[Any]], hidden: Array) -> None:
        self._stages = stages
        self._feed = feed
        self._values = {_BEFORE: hidden}

    def inputs(self, linear: str) -> Array:
        """Compute the inputs of a linear, by its name in the layer, ``[tokens, in]``."""
        return flat(self._value(self._stages.inputs[linear]))

    def residual(self, linear: str) -> Array:
        """Compute the stream that a linear's result is added to, ``[tokens, hidden]``."""
        return flat(self._value(self._stages.streams[linear]))

    def round(self, linear: str, weights: Array) -> None:
        """Set a linear's weights ``[out, in]``; until then it has the checkpoint's exact ones."""
        self._feed[f"layers.0.{linear}.weight"] = np.ascontiguousarray(weights.T)

    def after(self) -> Array:
        """Compute the hidden states after the layer, ``[sequences, seq_len, hidden]``."""
        return self._value(io_spec.layer_output(0))

    def _value(self, name: str) -> Array:
        if name not in self._values:
            stages = self._stages
            sources = {source: self._value(source) for source in stages.sources[name]}
            self._values[name] = stages.stages[name].run(self._feed, sources)
            for source in stages.sources[name]:
                if source not in stages.kept:
                    del self._values[source]  # nothing else is computed from it
        return self._values[name]


class _Stages:
    """The graph of layers of the same parts, cut so that a stage has at most one linear's weights.

    Attributes:
        graph: the whole layer.
        inputs: the value that feeds each linear, by the linear's name in the layer.
        streams: the residual stream that each linear's result is added to, likewise.
        kept: values that more than one stage may begin with.
        sources: each value at which a stage ends, and the values it is computed from.
        stages: the stages by that value.
        fixed: what all these layers are fed.
    """

    def __init__(self, one: ModelSpec, seq_len: int) -> None:
        self.graph = LayerGraph(one, twin_taps)
        taps = linear_taps(self.graph.parts)
        self.inputs = {linear: f"layers.0.{value}" for value, linear in taps.items()}
        self.streams: dict[str, str] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.kept = {_BEFORE}
        stream = base = _BEFORE
        for before, part, _ in neighbours(self.graph.parts):
            match before, part:
                case _, Add(name=name):
                    if isinstance(before, Linear):
                        self.streams[before.name] = stream
                    added = f"layers.0.{name}"
                    self.sources[added] = (base, stream)
                    self.kept.add(added)
                    stream = base = added
                case _, Linear(name=name):
                    self.sources[self.inputs[name]] = (base,)
                    base = self.inputs[name]
                case _:
                    pass  # the stage of the next linear computes it
        whole = self.graph.build_layer()
        # A value at which another stage begins needs a known type.
        whole.graph.value_info.extend(whole.graph.output)
        self.stages = {
            value: _Stage(whole, [*sources, *self.graph.fed], value)
            for value, sources in self.sources.items()
        }
        self.fixed: dict[str, NDArray[Any]] = {
            **self.graph.rope_feed(seq_len),
            io_spec.POSITION_IDS: np.arange(seq_len, dtype=np.int64)[None],
        }


class _Stage:
    """A part of the layer's graph, from some of its values to one."""

    def __init__(self, whole: onnx.ModelProto, inputs: Sequence[str], output: str) -> None:
        part = Extractor(whole).extract_model([*inputs, io_spec.POSITION_IDS], [output])
        used = {name for node in part.graph.node for name in node.input}
        for value in [each for each in part.graph.input if each.name not in used]:
            part.graph.input.remove(value)
        self._inputs = [value.name for value in part.graph.input]
        self._session = run_session(part)

    def run(self, feed: dict[str, NDArray[Any]], values: dict[str, Array]) -> Array:
        """Run all sequences, one after the other."""
        fixed = {name: feed[name] for name in self._inputs if name in feed}
        count = len(next(iter(values.values())))
        result = np.empty((0,), dtype=np.float32)
        for at in range(count):
            each = {name: value[at : at + 1] for name, value in values.items()}
            [row] = self._session.run(None, fixed | each)
            if not at:
                result = np.empty((count, *row.shape[1:]), dtype=np.float32)
            result[at] = row[0]
        return result


def flat(values: Array) -> Array:
    """Join the tokens of all sequences, ``[tokens, width]``."""
    return values.reshape(-1, values.shape[-1])
