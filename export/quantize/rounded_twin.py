"""Runs the calibration text through the layers as they are rounded so far.

The inputs of a linear in the bundle carry the errors of all linears before it. So a decoder layer
is run here from one linear's inputs to the next one's. Each linear can then be rounded for the
inputs that it will get, and make up for the errors in them (`error_feedback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.utils import Extractor

from edge.bundle import io_spec
from export.sources.checkpoint import Checkpoint

from .calibration import TAPS, LayerGraph, rope_feed, run_session

Array = NDArray[np.float32]
RESIDUAL = "residual"
"""The residual stream that down's result is added to; o's is added to the layer's input."""
TAPS_OF_BOTH = {**TAPS, "attention_residual": RESIDUAL}
"""Values that the float model must show of a layer if the rounded model runs, too."""
_BEFORE, _BETWEEN, _AFTER = (
    io_spec.INPUTS_EMBEDS,
    "layers.0.attention_residual",
    io_spec.layer_output(0),
)
_SEEN = {linear: f"layers.0.{value}" for value, linear in TAPS.items()}
# Each value, and the values it is computed from with the weights of at most one linear, in order.
_STAGES: dict[str, tuple[str, ...]] = {
    _SEEN["qkv"]: (_BEFORE,),
    _SEEN["o"]: (_SEEN["qkv"],),
    _BETWEEN: (_SEEN["o"], _BEFORE),
    _SEEN["gate_up"]: (_BETWEEN,),
    _SEEN["down"]: (_SEEN["gate_up"],),
    _AFTER: (_SEEN["down"], _BETWEEN),
}


class RoundedTwin:
    """The layers of a model, each to be run linear by linear.

    Args:
        checkpoint: the model.
        seq_len: tokens of a sequence.
    """

    def __init__(self, checkpoint: Checkpoint, seq_len: int) -> None:
        model = checkpoint.spec
        self.graph = LayerGraph(model, TAPS_OF_BOTH)
        whole = self.graph.build_layer()
        # A value at which another stage begins needs a known type.
        whole.graph.value_info.extend(whole.graph.output)
        self.stages = {
            value: _Stage(whole, [*sources, *self.graph.fed], value)
            for value, sources in _STAGES.items()
        }
        self.fixed: dict[str, NDArray[Any]] = {
            **rope_feed(model, seq_len),
            io_spec.POSITION_IDS: np.arange(seq_len, dtype=np.int64)[None],
        }

    def layer(self, checkpoint: Checkpoint, index: int, hidden: Array) -> RoundedLayer:
        """Begin a layer.

        Args:
            checkpoint: the model with all factors folded in.
            index: number of the layer.
            hidden: hidden states before it, float32 ``[sequences, seq_len, hidden]``.
        """
        return RoundedLayer(self, self.fixed | self.graph.weights(checkpoint, index), hidden)


class RoundedLayer:
    """One decoder layer; its linears are rounded in their order, before the next one's inputs."""

    def __init__(self, twin: RoundedTwin, feed: dict[str, NDArray[Any]], hidden: Array) -> None:
        self._twin = twin
        self._feed = feed
        self._values = {_BEFORE: hidden}

    def inputs(self, linear: str) -> Array:
        """Compute the inputs of ``qkv``, ``o``, ``gate_up`` or ``down``, ``[tokens, in]``."""
        return flat(self._value(_SEEN[linear]))

    def residual(self, linear: str) -> Array:
        """Compute the stream before ``o`` or ``down`` is added, ``[tokens, hidden]``."""
        return flat(self._value(_BEFORE if linear == "o" else _BETWEEN))

    def round(self, linear: str, weights: Array) -> None:
        """Set a linear's weights ``[out, in]``; until then it has the checkpoint's exact ones."""
        self._feed[f"layers.0.{linear}.weight"] = np.ascontiguousarray(weights.T)

    def after(self) -> Array:
        """Compute the hidden states after the layer, ``[sequences, seq_len, hidden]``."""
        return self._value(_AFTER)

    def _value(self, name: str) -> Array:
        if name not in self._values:
            sources = {source: self._value(source) for source in _STAGES[name]}
            self._values[name] = self._twin.stages[name].run(self._feed, sources)
            for source in _STAGES[name]:
                if source not in (_BEFORE, _BETWEEN):
                    del self._values[source]  # nothing else is computed from it
        return self._values[name]


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
