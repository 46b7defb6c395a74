"""What a decoder with adapters takes besides: the section of its manifest, and two inputs a linear.

Per joined linear, with ``P`` modules in it (3 of ``qkv``, 2 of ``gate_up``, else 1) and ``r`` the
rank of a step, 0 or that of the bundle:

====  =================================  =================  =====================================
I/O   name                               shape              meaning
====  =================================  =================  =====================================
in    adapters.layers.i.qkv.a            [B, P * r, in]     each sequence's own A, in peft's layout
in    adapters.layers.i.qkv.b            [B, out, P * r]    its B, scaled, block-diagonal
====  =================================  =================  =====================================

The graph adds ``(x @ a.T) @ b.T`` to the product, before a bias. A step in which no sequence has an
adapter runs at rank 0, which is the graph without any; a sequence without one beside others has
zeros.

Export may fold factors on the inputs of linears into the layers before them
(`export.quantize.scaled_checkpoint`), and an adapter was trained without. So the bundle keeps the
factors, and `Basis` brings an adapter to what the graph computes with.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle.extras import read_extra
from edge.bundle.io_spec import BATCH, TensorSpec
from edge.bundle.linears import LinearSpec, linear_layers
from edge.bundle.manifest import FloatType, HeadManifest, Line, Manifest, ModelSpec
from edge.bundle.sizes import ALIGNMENT, ENGINE_FLOAT_BYTES, ProfileName
from edge.errors import BundleError, CheckpointError, ConfigError
from edge.files import MALFORMED

from .safetensors_header import read_header

SECTION = "adapters"
"""Of the manifest, see `read_section`."""
FACTORS_NAME = "adapters.safetensors"
"""The bundle's file of `Basis`; a bundle whose export folded no factors has none."""
MAX_RANK = 128
ADAPTER = ".adapter"
"""Of a tensor's name, behind that of its linear: what is added to the product."""
_RANK_DIMS = {parts: f"adapter_rank_x{parts}" for parts in (1, 2, 3)}
"""Names of the graph's dimensions: ranks of as many joined modules."""
Array = NDArray[np.float32]
_DIVIDED = {"qkv": "o", "gate_up": "down"}


class AdapterSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest's section.

    Attributes:
        rank: the largest rank of an adapter that the bundle takes.
        linears: names of the joined linears that take one, in the order of the graph's inputs.
    """

    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
    linears: tuple[Line, ...]


def adapted_linears(model: ModelSpec) -> list[LinearSpec]:
    """The joined linears that can have adapters: all but the lm_head."""
    return [layer for layer in linear_layers(model) if layer.name != "lm_head"]


def section(model: ModelSpec, rank: int) -> dict[str, Any]:
    """Make the manifest's section of a bundle that takes adapters of a rank."""
    names = tuple(layer.name for layer in adapted_linears(model))
    made: dict[str, Any] = msgspec.to_builtins(AdapterSection(rank, names))
    return made


def read_section(manifest: Manifest) -> AdapterSection | None:
    """Read what a bundle says of adapters; None where it takes none, as a bundle's head.

    Raises:
        BundleError: the section does not fit, or names other linears than the model has.
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
    """The inputs of a bundle's graph for adapters, in graph order; none where it takes none."""
    if read_section(manifest) is None:
        return []
    return [spec for pair in linear_inputs(manifest.model, float_type).values() for spec in pair]


def linear_inputs(
    model: ModelSpec, float_type: FloatType
) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """A and B of each joined linear, by its name."""
    found = {}
    for layer in adapted_linears(model):
        name, (width, out) = f"{SECTION}.{layer.name}", layer.shape
        rank = _RANK_DIMS[len(layer.rows)]
        found[layer.name] = (
            TensorSpec(f"{name}.a", (BATCH, rank, width), float_type),
            TensorSpec(f"{name}.b", (BATCH, out, rank), float_type),
        )
    return found


def rank_sizes(rank: int) -> dict[str, int]:
    """The dimensions of all linears' inputs in a step of some rank."""
    return {name: parts * rank for parts, name in _RANK_DIMS.items()}


def with_adapters(profile: ProfileName) -> ProfileName:
    """The profile of an engine that runs the same steps at the rank of adapters."""
    return cast(ProfileName, f"{profile}-adapters")


def slot_values(model: ModelSpec, rank: int) -> int:
    """Numbers that A and B of all linears hold for one slot."""
    return sum(len(layer.rows) * rank * sum(layer.shape) for layer in adapted_linears(model))


def check_aligned(model: ModelSpec, rank: int) -> None:
    """Refuse a rank whose slots an engine could not be given, as they follow each other.

    Raises:
        ConfigError: A or B of a slot does not end at a multiple of `ALIGNMENT` bytes.
    """
    widths = {size for layer in adapted_linears(model) for size in layer.shape}
    step = max(ALIGNMENT // math.gcd(ALIGNMENT, size * ENGINE_FLOAT_BYTES) for size in widths)
    if rank % step:
        raise ConfigError(
            f"adapters of rank {rank} put slots at addresses that TensorRT refuses; export the "
            f"bundle with --adapters {-(-rank // step) * step}, a multiple of {step}"
        )


class Basis:
    """Brings adapters of the model as it was trained to the channels of a bundle's graph.

    Args:
        model: the bundle's.
        factors: on the input channels of linears by name, float32 ``[in]``; the layers before
            divide by them.
    """

    def __init__(self, model: ModelSpec, factors: Mapping[str, Array]) -> None:
        self._model, self._factors = model, factors

    def __call__(self, layer: LinearSpec, a: Array, b: Array) -> tuple[Array, Array]:
        """A ``[n, in]`` and B ``[out, n]`` of a linear, as its graph needs them."""
        block, _, kind = layer.name.rpartition(".")
        columns = self._factors.get(layer.name)
        if columns is not None:
            a = a * columns
        # Whose factors the last rows of B are divided by: those of the values, or of up.
        rows = self._factors.get(f"{block}.{_DIVIDED.get(kind)}")
        if rows is not None:
            if kind == "qkv":  # one factor per KV channel, which its query heads share
                shape = (self._model.num_kv_heads, -1, self._model.head_dim)
                rows = rows.reshape(shape)[:, 0].reshape(-1)
            b = b.copy()
            b[-len(rows) :] /= rows[:, None]
        return a, b


def read_basis(bundle: Path, manifest: Manifest) -> Basis:
    """Read the factors of a bundle, whose files are verified.

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
