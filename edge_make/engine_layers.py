"""Reads the layers of a compiled engine, as TensorRT's engine inspector lists them.

The inspector's JSON (``IEngineInspector::getEngineInformation``) has a list ``Layers``: names
alone, or with the profiling verbosity ``DETAILED`` an object per layer. These keys are read:

===================  ===========================================================================
``Name``             layers of the second and later profiles end with ``[profile 1]``, ...
``LayerType``        ``gemm``, ``kgen`` (a kernel that the compiler wrote), ``Reformat``, ...
``Inputs``           per tensor ``Name`` and ``Format/Datatype`` (TensorRT 10) or ``Datatype``
``Outputs``          the same
``Weights``          ``Type`` of weights that belong to the layer; not every kind of layer has it
``TacticName``       the kernel
``Metadata``         ``[ONNX Layer: NODE]`` of every node that went into the layer
===================  ===========================================================================

Sources: NVIDIA's guide to the engine inspector, its page on the change from TensorRT 10 to 11, and
the readers in NVIDIA/TensorRT (``tools/experimental/trt-engine-explorer``, ``tools/Polygraphy``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge.bundle.manifest import FloatType, TensorScheme
from edge.bundle.profile_layers import PROFILE_MARK, AttentionKind, ProfileLayers, plain_name
from edge.errors import BundleError
from edge.files import MALFORMED, read_file

_SUFFIX = ".layers.json"
_MAX_BYTES = 1 << 26
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPE = re.compile(
    r"\b(?:(fp16|half)|(bf16|bfloat16)|(fp32|float)|(fp8)|(fp4)|(int4)|(int8)|(int32)|(int64)"
    r"|(bool)|(uint8))\b",
    re.IGNORECASE,
)
_TYPES = ("fp16", "bf16", "fp32", "fp8", "fp4", "int4", "int8", "int32", "int64", "bool", "uint8")
_NARROWEST_FIRST = ("int4", "fp4", "int8", "fp8", "fp16", "bf16", "fp32")
_PACKED = ("int4", "fp4", "int8", "fp8")
_PRODUCT = re.compile(r"gemm|gemv|matrixmultiply|\bfc\b", re.IGNORECASE)
_FUSED_ATTENTION = re.compile(r"mha", re.IGNORECASE)  # _gemm_mha_v2, _gemv_mha_v1, fmha_...
# Names of `export.graph.decoder`; nodes that dequantize inputs or cache rows do not match.
_WEIGHT_NODE = re.compile(r"(?P<linear>.+)\.(?:high_)?dequantized/DequantizeLinear")
_OWN_PRODUCT = "/w4_linear"  # of engines.graph.own_kernels: a plugin, whose INT4 weights are words
_OWN_ATTENTION = re.compile(r"\.attention/attention_(?:parts|join)\Z")  # of graph.own_attention
_CACHE = re.compile(r"(?:past_key_values|present)\.\d")  # see `edge.bundle.io_spec`
_ATTENTION_NODE = re.compile(r"\.attended/Attention\Z|/Softmax\Z")


class _LayerStruct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct here."""


class CompiledLayer(_LayerStruct, frozen=True):
    """One layer of an engine, which the GPU mostly runs as one kernel.

    Attributes:
        name: its name without the mark of its profile, as a profiler reports it.
        profile: index of its optimization profile.
        kind: TensorRT's ``LayerType``.
        reads, writes: element types of its inputs and weights, and of its outputs.
        tactic: name of the kernel; empty if TensorRT names none.
        nodes: the ONNX nodes that went into it.
        touches_cache: whether rows of the KV cache go in or come out under the graph's names.
    """

    name: str
    profile: int
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]
    touches_cache: bool = False

    @property
    def dtype(self) -> str:
        """The narrowest number type that it reads, else writes; ``-`` if it handles no numbers."""
        if self._is_own:
            return "int4"
        for found in (self.reads, self.writes):
            for dtype in _NARROWEST_FIRST:
                if dtype in found:
                    return dtype
        return "-"

    @property
    def kernel(self) -> str:
        """Name of its kernel, or of the layer where TensorRT names no kernel."""
        return self.tactic or self.name

    @property
    def reformats(self) -> bool:
        """Whether it only writes a tensor in another layout or type."""
        return self.kind.lower() == "reformat" or self.name.startswith("Reformatting CopyNode")

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product, alone or with what was fused into it."""
        return (
            _PRODUCT.search(f"{self.kind} {self.tactic}") is not None
            or any(node.endswith("/MatMul") for node in self.nodes)
            or self._is_own
        )  # fmt: skip

    @property
    def _is_own(self) -> bool:
        return any(node.endswith(_OWN_PRODUCT) for node in self.nodes)

    @property
    def unpacks(self) -> bool:
        """Whether it writes packed weights as floats, which the product then reads again."""
        weights = any(_linear_of(node) is not None for node in self.nodes)
        packed = any(dtype in _PACKED for dtype in self.reads)
        return weights and packed and not self.multiplies


class LayerTable(_LayerStruct, frozen=True):
    """All layers of an engine, as they are kept beside its plan.

    Attributes:
        profiles: names of the optimization profiles, by index.
        layers: in the order of the inspector.
    """

    profiles: tuple[str, ...]
    layers: tuple[CompiledLayer, ...]

    def of(self, profile: str) -> list[CompiledLayer]:
        """Layers of one profile."""
        index = self.profiles.index(profile)
        return [layer for layer in self.layers if layer.profile == index]

    def unpacked(self, profile: str) -> list[str]:
        """List the linear layers whose weights a profile unpacks, one entry per plane."""
        nodes = dict.fromkeys(
            node for layer in self.of(profile) if layer.unpacks for node in layer.nodes
        )
        return [linear for node in nodes if (linear := _linear_of(node)) is not None]

    def summary(self) -> tuple[ProfileLayers, ...]:
        """A summary per profile that has layers."""
        found = ((name, self.of(name)) for name in self.profiles)
        return tuple(_summarize(name, layers) for name, layers in found if layers)


def parse_inspector(texts: Sequence[str], profiles: Sequence[str]) -> LayerTable:
    """Read what the engine inspector printed.

    Args:
        texts: its JSON: one text about the whole engine, or one per profile.
        profiles: names of the engine's profiles, in order.

    Raises:
        BundleError: it is no such JSON, or it has no details of the layers.
    """
    if len(texts) == 1:
        return LayerTable(tuple(profiles), _parse_text(texts[0]))
    layers: list[CompiledLayer] = []
    for index, text in enumerate(texts):
        found = _parse_text(text)
        marked = [layer for layer in found if layer.profile == index]
        layers += marked or [msgspec.structs.replace(layer, profile=index) for layer in found]
    return LayerTable(tuple(profiles), tuple(layers))


def told_profiles(text: str) -> set[int]:
    """Indices of the profiles whose layers a text of the inspector lists.

    Raises:
        BundleError: the text is not what `parse_inspector` reads.
    """
    return {layer.profile for layer in _parse_text(text)}


def _parse_text(text: str) -> tuple[CompiledLayer, ...]:
    try:
        found = msgspec.json.decode(text.encode())
        listed = found["Layers"]
        if listed and all(isinstance(layer, str) for layer in listed):
            raise BundleError(
                "the engine was built without details: its layers have names only (profiling "
                "verbosity LAYER_NAMES_ONLY); build it again with: edge-llm build"
            )
        layers = tuple(_parse_layer(layer) for layer in listed)
    except (KeyError, TypeError, AttributeError, *MALFORMED) as error:
        raise BundleError(
            f"TensorRT's engine inspector printed something that is no table of layers: {error!r}"
        ) from error
    if not layers:
        raise BundleError(
            "TensorRT's engine inspector lists no layers: the engine was built with profiling "
            "verbosity NONE; build it again with: edge-llm build"
        )
    return layers


def layers_path(plan: Path) -> Path:
    """Return where the table of a plan's layers is kept: beside it."""
    return plan.with_suffix(_SUFFIX)


def is_layers_file(name: str) -> bool:
    """Whether a file's name is that of a table of layers."""
    return name.endswith(_SUFFIX)


def read_layers(plan: Path) -> LayerTable | None:
    """Read the table of a plan's layers; None if the build left none.

    Raises:
        BundleError: it is damaged.
    """
    path = layers_path(plan)
    try:
        return msgspec.json.decode(read_file(path, _MAX_BYTES), type=LayerTable)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except MALFORMED as error:
        raise BundleError(f"{path} is damaged ({error}); build the engine again") from error


def _linear_of(node: str) -> str | None:
    """Return the linear layer whose weight a node dequantizes; None if it does something else."""
    match = _WEIGHT_NODE.fullmatch(node)
    return None if match is None or match["linear"].endswith(".input") else match["linear"]


def _parse_layer(layer: dict[str, Any]) -> CompiledLayer:
    name = str(layer["Name"])
    profile = PROFILE_MARK.search(name)
    weights = layer.get("Weights")
    types = [_dtype(tensor) for tensor in layer.get("Inputs", ())]
    tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    if isinstance(weights, dict):
        types.append(_dtype({"Datatype": weights.get("Type", "")}))
    return CompiledLayer(
        plain_name(name),
        int(profile[1]) if profile else 0,
        str(layer.get("LayerType", "")),
        tuple(filter(None, types)),
        tuple(filter(None, (_dtype(tensor) for tensor in layer.get("Outputs", ())))),
        str(layer.get("TacticName", "")),
        tuple(_NODE.findall(layer.get("Metadata", ""))),
        any(_CACHE.match(str(tensor.get("Name", ""))) for tensor in tensors),
    )


def _dtype(tensor: dict[str, Any]) -> str | None:
    """Return the element type of a tensor; None where the inspector does not tell (``N/A``)."""
    for key in ("Datatype", "DataType", "Format/Datatype"):
        match = _TYPE.search(str(tensor.get(key, "")))
        if match is not None and match.lastindex is not None:
            return _TYPES[match.lastindex - 1]
    return None


def _summarize(profile: str, layers: list[CompiledLayer]) -> ProfileLayers:
    products = Counter(layer.dtype for layer in layers if layer.multiplies and not _attends(layer))
    return ProfileLayers(
        profile,
        len(layers),
        sum(len(layer.nodes) > 1 for layer in layers),
        sum(layer.reformats for layer in layers),
        sum(layer.unpacks for layer in layers),
        dict(sorted(products.items())),
        _attention(layers),
        sum(layer.reformats and layer.touches_cache for layer in layers),
    )


def _attends(layer: CompiledLayer) -> bool:
    return any(_ATTENTION_NODE.search(node) for node in layer.nodes) or _is_fused(layer)


def _is_fused(layer: CompiledLayer) -> bool:
    return _FUSED_ATTENTION.search(f"{layer.name} {layer.tactic}") is not None


def _attention(layers: list[CompiledLayer]) -> AttentionKind:
    """Tell whether attention runs in kernels of its own: those have ``mha`` in their names."""
    own = any(_OWN_ATTENTION.search(node) for layer in layers for node in layer.nodes)
    if own:
        return "mixed" if any(map(_attends, layers)) else "own"
    fused = [_is_fused(layer) for layer in layers if _attends(layer)]
    if not fused:
        return "unknown"
    inside = {
        node
        for layer in layers
        if _is_fused(layer)
        for node in layer.nodes
        if _ATTENTION_NODE.search(node)
    }
    apart = {
        node
        for layer in layers
        if not _is_fused(layer)
        for node in layer.nodes
        if _ATTENTION_NODE.search(node)
    }
    if not any(fused):
        return "decomposed"
    return "mixed" if apart - inside else "fused"


def engine_dtype(scheme: TensorScheme, float_type: FloatType) -> str:
    """Return the type of a scheme's weights in an engine, e.g. ``int4`` for both planes."""
    if scheme.planes:
        return "int4"
    return {"float": float_type, "w8a8": "int8"}.get(scheme.kind, scheme.kind)
