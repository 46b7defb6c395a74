"""Counts bytes of the weights by part, for every quantization that ``edge-llm export`` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from edge.bundle.linears import linear_layers, norm_layers
from edge.bundle.manifest import HeadManifest, Manifest, TensorScheme
from edge.bundle.memory_facts import PARTS, MemoryFacts, Part
from edge.bundle.schemes import SCALE_BYTES, SCHEMES, stored_bytes
from edge.model.spec import ModelSpec

# ONNX Runtime keeps the fp32 scales, packs them beside the integers, and adds sums of each group.
ORT_SCALE_COPIES = 3
_ORT_INT8_FACTOR = 1.1  # measured: the layout of the 8-bit kernel adds this
_ORT_LOAD_FACTOR = 0.45  # measured: a layer's original lives beside its packed copy for a while
_ORT_JOINED_BYTES = 1.0  # per weight in planes: the joined weight, until all are packed
_PART_OF: dict[str, Part] = {
    "qkv": "attention",
    "o": "attention",
    "gate_up": "mlp",
    "down": "mlp",
    "fc": "mlp",
    "lm_head": "lm_head",
}
_FLOAT_BYTES = 2


class Linear(NamedTuple):
    """A linear layer as it is stored.

    Attributes:
        name: e.g. ``layers.0.qkv``.
        shape: ``[in, out]``.
        scheme: how its weight is stored.
        num_bytes: bytes of weight and scales from a bundle's manifest; None: not exported yet.
    """

    name: str
    shape: tuple[int, int]
    scheme: TensorScheme
    num_bytes: int | None = None

    @property
    def part(self) -> Part:
        """Return the part that its weight counts to: ``attention``, ``mlp`` or ``lm_head``."""
        return part_of(self.name)

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Return bytes of its weight and of its scales; the real ones if it is in a bundle.

        Bytes that the scheme does not explain count to the weight: channels in float, and scales in
        FP32.
        """
        weight, scales = stored_bytes(self.shape, self.scheme)
        if self.num_bytes is None:
            return weight, scales
        # The manifest's bytes of a layer do not include the scale of the inputs.
        own = scales - (SCALE_BYTES if SCHEMES[self.scheme.kind].int8_inputs else 0)
        return self.num_bytes - own, scales


def part_of(layer: str) -> Part:
    """Return the part that a linear layer counts to, by its name.

    Raises:
        KeyError: it is not a linear layer of a decoder.
    """
    return _PART_OF[layer.rpartition(".")[2]]


def manifest_linears(manifest: Manifest, draft: Manifest | None = None) -> list[Linear]:
    """List the linear layers of a bundle, as its manifest has them.

    Args:
        manifest: the bundle's manifest.
        draft: manifest of the head that drafts for it. With a head the graph has one more product,
            which joins the hidden states that the head reads; a session without the head drops it.
    """
    linears = [
        Linear(name, linear.shape, linear.scheme, linear.num_bytes)
        for name, linear in manifest.quantization.linears.items()
    ]
    if manifest.head is not None and isinstance(draft, HeadManifest):
        shape = (len(manifest.head.layers) * manifest.model.hidden_size, manifest.hidden_width)
        linears.append(Linear("fc", shape, TensorScheme("float")))
    return linears


def weight_parts(model: ModelSpec, linears: Iterable[Linear], positions: int) -> dict[Part, int]:
    """Count the bytes of everything that the engine's graph holds, by part.

    Args:
        model: dimensions.
        linears: its linear layers.
        positions: rows of the RoPE table.

    Returns:
        Bytes by part. ``norms`` includes the biases. ``rope`` is the cos/sin table, of which a step
        reads a row.
    """
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for linear in linears:
        weight, scales = linear.stored_bytes
        parts[linear.part] += weight
        parts["scales"] += scales
    biases = sum(layer.shape[1] for layer in linear_layers(model) if layer.biases)
    parts["norms"] = _FLOAT_BYTES * (sum(norm.size for norm in norm_layers(model)) + biases)
    # cos and sin of half the turned dimensions each
    turned = sum(map(model.rope_dims, range(len(model.ropes))))
    parts["rope"] = _FLOAT_BYTES * positions * turned
    return parts


def count_facts(model: ModelSpec, linears: Sequence[Linear], positions: int) -> MemoryFacts:
    """Count how much memory the weights of a model take.

    Args:
        model: dimensions.
        linears: its linear layers (`manifest_linears`, or from a recipe).
        positions: rows of the RoPE table.
    """
    parts = weight_parts(model, linears, positions)
    joined = sum(math.prod(linear.shape) for linear in linears if linear.scheme.planes)
    loading = int(_ORT_LOAD_FACTOR * sum(parts.values()) + _ORT_JOINED_BYTES * joined)
    return MemoryFacts(parts, _host_parts(parts, linears), loading)


def _host_parts(parts: Mapping[Part, int], linears: Iterable[Linear]) -> dict[Part, int]:
    """Count the bytes of weights in ONNX Runtime on the CPU: floats in fp32, integers packed."""
    result = dict(parts)
    wide: tuple[Part, ...] = ("scales", "norms", "rope")
    for part in wide:
        result[part] = 2 * parts[part]
    result["scales"] *= ORT_SCALE_COPIES
    for linear in linears:
        weight, scales = stored_bytes(linear.shape, linear.scheme)
        if linear.scheme.planes:  # joined at load, so the low plane's scales remain
            result["scales"] -= ORT_SCALE_COPIES * scales
        grown = {"float": 2.0, "int8": _ORT_INT8_FACTOR}.get(linear.scheme.kind, 1.0)
        result[linear.part] += round((grown - 1) * weight)
    return result
