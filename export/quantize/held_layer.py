"""Keeps the tensors of the decoder layer that is being quantized.

GPTQ reads each weight four times: for the float model, for AWQ's factors, for the rounded model,
and to round it. Each read would dequantize a GGUF file's weights or merge an adapter again.
"""

from __future__ import annotations

import re
from typing import Any

from numpy.typing import NDArray

from export.sources.checkpoint import Checkpoint, Transformed

_LAYER = re.compile(r"model\.layers\.\d+\.")


class HeldLayer(Transformed):
    """A checkpoint that reads each tensor of a decoder layer once, until another layer is read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._layer = ""
        self._tensors: dict[str, NDArray[Any]] = {}

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor, a layer's as a read-only view; see `Checkpoint.tensor`."""
        match = _LAYER.match(name)
        if match is None:
            return super().tensor(name)
        if match[0] != self._layer:
            self._layer = match[0]
            self._tensors.clear()
        if name not in self._tensors:
            tensor = super().tensor(name).view()
            tensor.flags.writeable = False
            self._tensors[name] = tensor
        return self._tensors[name]
