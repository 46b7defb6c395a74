"""Holds a parsed network as plain data: what TensorRT understood, without TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class TensorView:
    """A tensor's name, element type (``fp16``, ``int4``, ...) and shape (-1 is dynamic)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements of a static shape."""
        result = 1
        for size in self.shape:
            result *= size
        return result


@dataclass(frozen=True)
class LayerView:
    """One layer; ``kind`` is TensorRT's layer type in lower case, e.g. ``matrix_multiply``."""

    name: str
    kind: str
    inputs: tuple[TensorView | None, ...]
    outputs: tuple[TensorView, ...]


@dataclass(frozen=True)
class AttentionView:
    """One attention.

    Attributes:
        output: name of its output.
        mask: name of its mask, or None.
        causal: ``none``, ``upper_left`` or ``lower_right``.
        lengths: name of the tensor with each sequence's length, or None.
    """

    name: str
    output: str
    mask: TensorView | None
    causal: str
    lengths: str | None


@dataclass(frozen=True)
class NetworkView:
    """A network's layers in network order, attentions, inputs and outputs."""

    layers: tuple[LayerView, ...]
    attentions: tuple[AttentionView, ...]
    inputs: tuple[TensorView, ...]
    outputs: tuple[TensorView, ...]

    @cached_property
    def producers(self) -> dict[str, LayerView]:
        """Map each tensor's name to the layer that makes it."""
        return {out.name: layer for layer in self.layers for out in layer.outputs}

    @cached_property
    def live(self) -> frozenset[str]:
        """Names of all tensors that an output depends on."""
        return frozenset(self.ancestors(*(out.name for out in self.outputs)))

    def ancestors(self, *names: str) -> Iterator[str]:
        """Yield these tensors and everything that they are computed from."""
        seen: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            layer = self.producers.get(name)
            if layer is not None:
                todo += [tensor.name for tensor in layer.inputs if tensor is not None]
