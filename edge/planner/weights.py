"""Bytes of the weights by part, for every quantization that ``edge-llm export`` writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edge.bundle.manifest import Manifest, ModelSpec, TensorScheme
from edge.errors import ConfigError

Part = Literal["attention", "mlp", "lm_head", "scales", "norms", "rope"]
PARTS: tuple[Part, ...] = ("attention", "mlp", "lm_head", "scales", "norms", "rope")
_GROUP_SIZES = (128, 64, 32)
INT4_GROUP_SIZE = 32
"""Of INT4 layers where nobody says: 128 loses three times as much (docs/quantization.md)."""
_PART_OF: dict[str, Part] = {
    "qkv": "attention",
    "o": "attention",
    "gate_up": "mlp",
    "down": "mlp",
    "lm_head": "lm_head",
}
_FLOAT = TensorScheme(kind="float")
_W8A8 = TensorScheme(kind="w8a8")


@dataclass(frozen=True)
class Variant:
    """One quantization, as ``edge-llm export`` is asked for it.

    Attributes:
        name: shown to the user, e.g. ``int4-g128``.
        quant: ``--quant``.
        group_size: ``--group-size``; None is 32 for INT4 layers, the largest that fits for INT8.
        keep: ``--keep`` overrides for the lm_head, or empty.
    """

    name: str
    quant: Literal["fp16", "int8", "int8-w8a8", "int4"]
    group_size: int | None = None
    keep: str = ""

    def export_options(self) -> list[str]:
        """The options of ``edge-llm export`` that make this variant."""
        options = ["--quant", self.quant]
        if self.group_size is not None:
            options += ["--group-size", str(self.group_size)]
        if self.keep:
            options += ["--keep", self.keep]
        return options


VARIANTS: tuple[Variant, ...] = (
    Variant("fp16", "fp16"),
    Variant("int8", "int8"),
    Variant("int8-w8a8", "int8-w8a8"),
    Variant("int4", "int4"),
    Variant("int4-g128", "int4", 128),
    Variant("int4-head-fp16", "int4", None, "lm_head=float"),
    Variant("int4-head-int4", "int4", None, "lm_head=int4"),
)
"""Side by side in a plan; ``int4`` alone has groups of 32 and an INT8 lm_head."""


def find_variant(name: str) -> Variant:
    """A variant by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    for variant in VARIANTS:
        if variant.name == name:
            return variant
    known = ", ".join(variant.name for variant in VARIANTS)
    raise ConfigError(f"--quant {name} is unknown; known: {known}")


def linear_shapes(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """``[in, out]`` of every kind of linear layer; all but the lm_head stand in every layer."""
    hidden, wide = model.hidden_size, model.intermediate_size
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": (hidden, q_width + 2 * kv_width),
        "o": (q_width, hidden),
        "gate_up": (hidden, 2 * wide),
        "down": (wide, hidden),
        "lm_head": (hidden, model.vocab_size),
    }


def schemes(model: ModelSpec, variant: Variant) -> dict[str, TensorScheme]:
    """The scheme of each kind of linear layer, by the rules of ``edge-llm export``.

    Raises:
        ConfigError: no group size, or not the one asked for, divides the model's widths.
    """
    shapes = linear_shapes(model)

    def grouped(kind: Literal["int8", "int4"]) -> TensorScheme:
        fitting = [g for g in _GROUP_SIZES if all(s[0] % g == 0 for s in shapes.values())]
        default = INT4_GROUP_SIZE if kind == "int4" else (fitting or [0])[0]
        size = variant.group_size or default
        if size not in fitting:
            widths = sorted({shape[0] for shape in shapes.values()})
            raise ConfigError(
                f"{variant.name} does not fit this model: group sizes that divide its input "
                f"widths {widths} are {fitting or 'none'}"
            )
        return TensorScheme(kind=kind, group_size=size)

    if variant.quant == "fp16":
        return dict.fromkeys(shapes, _FLOAT)
    if variant.quant == "int8":
        return dict.fromkeys(shapes, grouped("int8"))
    if variant.quant == "int8-w8a8":
        result = dict.fromkeys(shapes, _W8A8)
        result.update(dict.fromkeys(("down", "lm_head"), grouped("int8")))
        return result
    result = dict.fromkeys(shapes, grouped("int4"))
    head = variant.keep.removeprefix("lm_head=") or "int8"
    result["lm_head"] = _FLOAT if head == "float" else grouped("int8" if head == "int8" else "int4")
    return result


def stored_bytes(shape: tuple[int, int], scheme: TensorScheme) -> tuple[int, int]:
    """Bytes of a weight and of its scales in a graph typed FP16."""
    width, out = shape
    if scheme.kind == "float":
        return 2 * width * out, 0
    groups = width // scheme.group_size if scheme.group_size else 1
    weight = width * out if scheme.kind != "int4" else (width * out + 1) // 2
    return weight, 2 * groups * out + (2 if scheme.kind == "w8a8" else 0)


@dataclass(frozen=True)
class Linear:
    """Linear layers that are alike.

    Attributes:
        part: where they count: ``attention``, ``mlp`` or ``lm_head``.
        shape: ``[in, out]``.
        scheme: how each is stored.
        count: how many there are.
    """

    part: Part
    shape: tuple[int, int]
    scheme: TensorScheme
    count: int


def variant_linears(model: ModelSpec, variant: Variant) -> list[Linear]:
    """The linear layers of a model in a quantization.

    Raises:
        ConfigError: see `schemes`.
    """
    shapes = linear_shapes(model)
    return [
        Linear(_PART_OF[kind], shapes[kind], scheme, 1 if kind == "lm_head" else model.num_layers)
        for kind, scheme in schemes(model, variant).items()
    ]


def manifest_linears(manifest: Manifest) -> list[Linear]:
    """The linear layers of a bundle, as its manifest has them."""
    return [
        Linear(_PART_OF[name.rsplit(".", maxsplit=1)[-1]], linear.shape, linear.scheme, 1)
        for name, linear in manifest.quantization.linears.items()
    ]


def weight_parts(model: ModelSpec, linears: Iterable[Linear], positions: int) -> dict[Part, int]:
    """Bytes of everything that the engine's graph holds, by part.

    Args:
        model: dimensions.
        linears: its linear layers.
        positions: rows of the RoPE table.

    Returns:
        ``norms`` has the biases too. ``rope`` is the cos/sin table, of which a step reads a row.
    """
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for linear in linears:
        weight, scales = stored_bytes(linear.shape, linear.scheme)
        parts[linear.part] += linear.count * weight
        parts["scales"] += linear.count * scales
    per_layer = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    if model.qkv_bias:
        per_layer += linear_shapes(model)["qkv"][1]
    parts["norms"] = 2 * (model.num_layers * per_layer + model.hidden_size)
    parts["rope"] = 2 * positions * model.head_dim  # cos and sin of half the head each
    return parts
