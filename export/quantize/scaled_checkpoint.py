"""Folds scales on the input channels of linears into the layers before, exactly in float.

The linear computes ``(x / s) (W diag(s))^T``. The division moves into the producer of ``x``. For a
linear after a norm that is the norm. After a gated MLP, whose result is ``silu(gate) * up``, it is
the rows of up. After attention, which mixes values, it is the rows of v (one scale per KV channel,
shared by the query heads of its group).
Sources: SmoothQuant (arXiv 2211.10438), AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError
from edge.model.names import module_name
from edge.model.parts import Add, Attention, GatedMlp, Linear, Norm, Rope, only, unknown_part
from export.sources.checkpoint import Checkpoint, Transformed

from .fed_linears import fed_linear, value_name

Array = NDArray[np.float32]


class ScaledCheckpoint(Transformed):
    """A model whose linears see scaled inputs; it computes the same logits.

    Args:
        checkpoint: the float model; see `Transformed`.
        scales: ``s`` float32 ``[in]`` by layer name (``layers.0.qkv``), of either sign; scales of
            channels that attention mixes must be the same for all query heads that share a KV head.

    Raises:
        CheckpointError: nothing before a linear can take scales.
    """

    def __init__(self, checkpoint: Checkpoint, scales: Mapping[str, Array]) -> None:
        super().__init__(checkpoint)
        self._columns: dict[str, Array] = {}  # by tensor
        self._rows: dict[str, Array] = {}
        # What divides the channels of a value, and the first of them, by the value's name.
        self._divided: dict[str, tuple[int, Array]] = {}
        for name, each in scales.items():
            self._fold(name, each)

    def _fold(self, name: str, scales: Array) -> None:
        fed = fed_linear(self.spec, name)
        if fed is None or fed.producer is None:
            raise CheckpointError(
                f"{name}: nothing before it can take scales of its inputs; "
                "export with --method rtn or gptq"
            )
        layer = name.rpartition(".")[0]
        number = int(layer.split(".")[1])
        for output, _ in fed.part.outputs:
            self._columns[f"{module_name(number, output)}.weight"] = scales
        match fed.source:
            case Attention(kv_heads=kv_heads, dim=dim):
                # One scale per KV channel, taken from its first query head.
                scales = scales.reshape(kv_heads, -1, dim)[:, 0].reshape(-1)
            case GatedMlp():
                self._divided[f"{layer}.{value_name(fed.source)}"] = 0, scales
            case Norm() | Linear() | Rope() | Add() | None:
                pass  # its weights take them as they are
            case _:
                unknown_part(fed.source)
        module = module_name(number, fed.producer)
        self._rows |= {f"{module}.weight": scales, f"{module}.bias": scales}
        for linear in only(self.spec.layer(number), Linear):
            start = 0
            for output, width in linear.outputs:
                if output == fed.producer:
                    self._divided[f"{layer}.{value_name(linear)}"] = start, scales
                start += width

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor, fp32 where a scale applies; see `Checkpoint.tensor`."""
        tensor = super().tensor(name)
        columns, rows = self._columns.get(name), self._rows.get(name)
        if columns is not None:
            tensor = tensor.astype(np.float32) * columns
        if rows is None:
            return tensor
        return tensor.astype(np.float32) / (rows[:, None] if tensor.ndim == 2 else rows)

    def peaks(self, seen: Mapping[str, Array]) -> dict[str, float]:
        """Find how large values get in this model, from their peaks in the model without scales.

        Args:
            seen: `calibration.LayerActivations.peaks` of the model without scales.

        Returns:
            The largest magnitude of each value, by its full name.
        """
        result = {}
        for name, channels in seen.items():
            if name in self._divided:
                start, divisors = self._divided[name]
                channels = channels.copy()
                channels[start : start + len(divisors)] /= np.abs(divisors)
            result[name] = float(channels.max())
        return result
