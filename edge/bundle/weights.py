"""Bytes of the weights by part, for every quantization that ``edge-llm export`` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from edge.bundle.linears import linear_layers, norm_layers
from edge.bundle.manifest import HeadManifest, Manifest, ModelSpec, TensorScheme
from edge.bundle.memory_facts import PARTS, MemoryFacts, Part
from edge.bundle.schemes import SCALE_BYTES, SCHEMES, stored_bytes
from edge.bundle.sizes import ENGINE_FLOAT_BYTES

# ONNX Runtime keeps the fp32 scales, packs them beside the integers, and adds sums of each group.
ORT_SCALE_COPIES = 3
_ORT_INT8_FACTOR = 1.1  # measured: what the 8-bit kernel's layout adds
_ORT_LOAD_FACTOR = 0.45  # measured: a layer's original lives beside its packed copy for a while
_ORT_JOINED_BYTES = 1.0  # per weight in planes: the joined one, until all are packed
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
        num_bytes: of weight and scales, as a bundle's manifest has them; None: not exported yet.
    """

    name: str
    shape: tuple[int, int]
    scheme: TensorScheme
    num_bytes: int | None = None

    @property
    def part(self) -> Part:
        """Where its weight counts: ``attention``, ``mlp`` or ``lm_head``."""
        return part_of(self.name)

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of its weight and of its scales; real ones where it is in a bundle.

        What the scheme does not tell counts to the weight: channels in float, the width of scales
        in FP32.
        """
        weight, scales = stored_bytes(self.shape, self.scheme)
        if self.num_bytes is None:
            return weight, scales
        # The scale of the inputs is not among the bytes that the manifest gives a layer.
        own = scales - (SCALE_BYTES if SCHEMES[self.scheme.kind].int8_inputs else 0)
        return self.num_bytes - own, scales

    @property
    def unpacked_bytes(self) -> int:
        """Bytes that TensorRT moves in every step because it unpacks the weight.

        It does so with INT8 weights whose inputs are floats (rule ``int8-weight-only``): the copy
        in floats is written, and read by the product.
        """
        if self.scheme.kind != "int8" or self.scheme.planes:
            return 0
        return unpacked_bytes(math.prod(self.shape))


def part_of(layer: str) -> Part:
    """Where a linear layer counts, by its name.

    Raises:
        KeyError: it is no linear layer of a decoder.
    """
    return _PART_OF[layer.rpartition(".")[2]]


def unpacked_bytes(weights: int) -> int:
    """Bytes written and read again where this many weights are unpacked in a step."""
    return 2 * ENGINE_FLOAT_BYTES * weights


def manifest_linears(manifest: Manifest, draft: Manifest | None = None) -> list[Linear]:
    """List the linear layers of a bundle, as its manifest has them.

    Args:
        manifest: the bundle's.
        draft: of what drafts for it. For a head the graph has one product more, which joins the
            hidden states that the head reads; a session without the head leaves it out.
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
        ``norms`` has the biases too. ``rope`` is the cos/sin table, of which a step reads a row.
    """
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for linear in linears:
        weight, scales = linear.stored_bytes
        parts[linear.part] += weight
        parts["scales"] += scales
    biases = sum(layer.shape[1] for layer in linear_layers(model) if layer.biases)
    parts["norms"] = _FLOAT_BYTES * (sum(norm.size for norm in norm_layers(model)) + biases)
    # cos and sin of half the head each
    parts["rope"] = _FLOAT_BYTES * positions * model.head_dim
    return parts


def count_facts(model: ModelSpec, linears: Sequence[Linear], positions: int) -> MemoryFacts:
    """Count what the weights of a model take.

    Args:
        model: dimensions.
        linears: its linear layers (`manifest_linears`, or of a recipe).
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
        if linear.scheme.planes:  # joined at load, which leaves the low plane's scales
            result["scales"] -= ORT_SCALE_COPIES * scales
        grown = {"float": 2.0, "int8": _ORT_INT8_FACTOR}.get(linear.scheme.kind, 1.0)
        result[linear.part] += round((grown - 1) * weight)
    return result
