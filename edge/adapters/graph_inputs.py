"""Names the extra inputs of a decoder with adapters: a manifest section, and two inputs per linear.

For each joined linear, ``P`` is the number of modules in it (3 in ``qkv``, 2 in ``gate_up``, else
1), and ``r`` is the rank of a step: 0 or the bundle's.

====  =================================  =================  =====================================
I/O   name                               shape              meaning
====  =================================  =================  =====================================
in    adapters.layers.i.qkv.a            [B, P * r, in]     each sequence's own A, in peft's layout
in    adapters.layers.i.qkv.b            [B, out, P * r]    its B, scaled, block-diagonal
====  =================================  =================  =====================================

The graph adds ``(x @ a.T) @ b.T`` to the product, before a bias. If no sequence of a step has an
adapter, the step runs at rank 0, which is the graph without adapters. A sequence without an adapter
next to others with one gets zeros.

Export may fold factors on the inputs of linears into the layers before them
(`export.quantize.scaled_checkpoint`), but an adapter was trained without them. So the bundle keeps
the factors, and `Basis` converts an adapter to the channels that the graph computes with.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.extras import read_extra
from edge.bundle.io_spec import BATCH, TensorSpec
from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import FloatType, HeadManifest, Line, Manifest
from edge.errors import BundleError, CheckpointError
from edge.files import MALFORMED
from edge.model.parts import MOST_OUTPUTS, Attention, only
from edge.model.spec import ModelSpec

from .safetensors_header import read_header

SECTION = "adapters"
"""Names the manifest's section, which `read_section` reads."""
FACTORS_NAME = "adapters.safetensors"
"""Names the bundle's file of `Basis`; a bundle whose export folded no factors has none."""
MAX_RANK = 128
ADAPTER = ".adapter"
"""Follows the linear's name in the name of the tensor that is added to the product."""
_RANK_DIM = "adapter_rank_x{}"
"""Names the graph's dimensions: the ranks of so many joined modules."""
Array = NDArray[np.float32]
_DIVIDED = {"qkv": "o", "gate_up": "down"}


class AdapterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest's section about adapters.

    Attributes:
        rank: the largest rank of an adapter that the bundle takes.
        linears: names of the joined linears that take an adapter, in order of the graph's inputs.
    """

    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
    linears: tuple[Line, ...]


def adapted_linears(model: ModelSpec) -> list[LinearSpec]:
    """Return the joined linears that can have adapters: all but the lm_head."""
    return [layer for layer in linear_layers(model) if layer.name != "lm_head"]


def section(model: ModelSpec, rank: int) -> dict[str, Any]:
    """Make the manifest's section for a bundle that takes adapters up to ``rank``."""
    names = tuple(layer.name for layer in adapted_linears(model))
    made: dict[str, Any] = msgspec.to_builtins(AdapterSection(rank, names))
    return made


def read_section(manifest: Manifest) -> AdapterSection | None:
    """Read the adapter section; None if the bundle takes no adapters or is a head.

    Raises:
        BundleError: the section is malformed, or names other linears than the model has.
    """
    if isinstance(manifest, HeadManifest):
        return None
    found = read_extra(manifest, SECTION, AdapterSection)
    names = tuple(layer.name for layer in adapted_linears(manifest.model))
    if found is not None and found.linears != names:
        raise BundleError(
            f"{manifest.name}: the manifest's section {SECTION} does not name the linears of the "
            "model; export the bundle again"
        )
    return found


def adapter_inputs(manifest: Manifest, float_type: FloatType) -> list[TensorSpec]:
    """Return the graph's inputs for adapters, in graph order; empty if the bundle takes none."""
    if read_section(manifest) is None:
        return []
    return [spec for pair in linear_inputs(manifest.model, float_type).values() for spec in pair]


def linear_inputs(
    model: ModelSpec, float_type: FloatType
) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """Return A and B of each joined linear, by its name."""
    found = {}
    for layer in adapted_linears(model):
        name, (width, out) = f"{SECTION}.{layer.name}", layer.shape
        rank = _RANK_DIM.format(len(layer.rows))
        found[layer.name] = (
            TensorSpec(f"{name}.a", (BATCH, rank, width), float_type),
            TensorSpec(f"{name}.b", (BATCH, out, rank), float_type),
        )
    return found


def rank_sizes(rank: int) -> dict[str, int]:
    """Return the dimensions of all linears' inputs in a step at ``rank``."""
    return {_RANK_DIM.format(parts): parts * rank for parts in range(1, MOST_OUTPUTS + 1)}


def slot_values(model: ModelSpec, rank: int) -> int:
    """Return how many numbers A and B of all linears hold for one slot."""
    return sum(len(layer.rows) * rank * sum(layer.shape) for layer in adapted_linears(model))


class Basis:
    """Converts adapters from the model as it was trained to the channels of a bundle's graph.

    Args:
        model: the bundle's model.
        factors: factors on the input channels of linears by name, float32 ``[in]``; the layers
            before divide by them.
    """

    def __init__(self, model: ModelSpec, factors: Mapping[str, Array]) -> None:
        self._model, self._factors = model, factors

    def __call__(self, layer: LinearSpec, a: Array, b: Array) -> tuple[Array, Array]:
        """Return A ``[n, in]`` and B ``[out, n]`` of a linear as its graph needs them."""
        block, _, kind = layer.name.rpartition(".")
        columns = self._factors.get(layer.name)
        if columns is not None:
            a = a * columns
        # Divide the last rows of B (values, or up) by the factors of the linear that reads them.
        rows = self._factors.get(f"{block}.{_DIVIDED.get(kind)}")
        if rows is not None:
            if kind == "qkv":  # one factor per KV channel, shared by its query heads
                number = int(block.rpartition(".")[2])
                (attention,) = only(self._model.layer(number), Attention)
                rows = rows.reshape(attention.kv_heads, -1, attention.dim)[:, 0].reshape(-1)
            b = b.copy()
            b[-len(rows) :] /= rows[:, None]
        return a, b


def read_basis(bundle: Path, manifest: Manifest) -> Basis:
    """Read the factors of a bundle whose files are verified.

    Raises:
        BundleError: the file is not one that the exporter wrote.
    """
    if FACTORS_NAME not in manifest.files:
        return Basis(manifest.model, {})
    path = bundle / FACTORS_NAME
    widths = {layer.name: layer.shape[0] for layer in adapted_linears(manifest.model)}
    try:
        data = path.read_bytes()
        factors = {}
        for name, entry in read_header(io.BytesIO(data), path, {"F32": 4}).items():
            factors[name] = np.frombuffer(data[entry.begin : entry.end], "<f4")
            if factors[name].shape != (widths[name],):
                raise ValueError(f"{name} is not the {widths[name]} factors of a linear")
            if not (np.isfinite(factors[name]) & (factors[name] != 0)).all():
                raise ValueError(f"a factor of {name} is not finite, or 0")
    except (OSError, CheckpointError, *MALFORMED) as error:
        raise BundleError(
            f"{path} has no factors of linears: {error}; export the bundle again"
        ) from error
    return Basis(manifest.model, factors)
