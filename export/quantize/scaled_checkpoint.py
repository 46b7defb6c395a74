"""Folds scales on the input channels of linears into the layers before, exactly in float.

The linear computes ``(x / s) (W diag(s))^T``. The division moves into the producer of ``x``. For
qkv and gate_up that is the norm before. For down, whose input is ``silu(gate) * up``, it is the
rows of up. For o, whose input is a mix of values, it is the rows of v (one scale per KV channel,
shared by the query heads of its group).
Sources: SmoothQuant (arXiv 2211.10438), AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.sources.checkpoint import Checkpoint, Transformed

Array = NDArray[np.float32]
_NAME = re.compile(r"(?:model\.)?(layers\.\d+)\.(.+)")
# The linear whose scales a tensor absorbs, by the tensor's name inside the layer.
_CONSUMERS = {
    **{f"self_attn.{part}_proj.weight": "qkv" for part in "qkv"},
    "self_attn.o_proj.weight": "o",
    "mlp.gate_proj.weight": "gate_up",
    "mlp.up_proj.weight": "gate_up",
    "mlp.down_proj.weight": "down",
}
_PRODUCERS = {
    "input_layernorm.weight": "qkv",
    "self_attn.v_proj.weight": "o",
    "self_attn.v_proj.bias": "o",
    "post_attention_layernorm.weight": "gate_up",
    "mlp.up_proj.weight": "down",
}
# The linear whose scales divide the last channels of a layer's value.
_DIVIDED = {"qkv.out": "o", "gate_up.out": "down", "gated": "down"}


class ScaledCheckpoint(Transformed):
    """A model whose linears see scaled inputs; it computes the same logits.

    Args:
        checkpoint: the float model; see `Transformed`.
        scales: ``s`` float32 ``[in]`` by layer name (``layers.0.qkv``), of either sign; a scale of
            ``o`` must be the same for all query heads that share a KV head.
    """

    def __init__(self, checkpoint: Checkpoint, scales: Mapping[str, Array]) -> None:
        super().__init__(checkpoint)
        self._scales = scales

    def tensor(self, name: str) -> NDArray[Any]:
        """Read a tensor, fp32 where a scale applies; see `Checkpoint.tensor`."""
        tensor = super().tensor(name)
        match = _NAME.fullmatch(name)
        if match is None:
            return tensor
        layer, part = match.groups()
        columns = self._scales.get(f"{layer}.{_CONSUMERS.get(part)}")
        if columns is not None:
            tensor = tensor.astype(np.float32) * columns
        rows = self._divisors(layer, _PRODUCERS.get(part))
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
            match = _NAME.fullmatch(name)
            divisors = match and self._divisors(match[1], _DIVIDED.get(match[2]))
            if divisors is not None:
                kept, divided = np.split(channels, [len(channels) - len(divisors)])
                channels = np.concatenate([kept, divided / np.abs(divisors)])
            result[name] = float(channels.max())
        return result

    def _divisors(self, layer: str, linear: str | None) -> Array | None:
        """Return the scales of a linear that divide the rows of the layer before it, ``[rows]``."""
        scales = self._scales.get(f"{layer}.{linear}")
        if scales is None or linear != "o":
            return scales
        model = self.spec  # one scale per KV channel, taken from its first query head
        return scales.reshape(model.num_kv_heads, -1, model.head_dim)[:, 0].reshape(-1)
