"""How weights are stored: the kinds of scheme, which layer gets which, and the bytes they take.

A new kind of scheme is a name in `manifest.SchemeKind`, an entry in `SCHEMES`, and a rule in
`RULES` for the ``--quant`` that uses it. The planner, the checks of disk and memory, and the
options ``--quant``, ``--keep`` and ``--group-size`` read it from there.

TensorRT takes one scale per group of weights for INT4 only (NvInfer.h of 10.3 to 11.1,
IDequantizeLayer), and what INT8 weights with float inputs it takes it unpacks in every step. So
INT8 is stored as two INT4 planes, ``w = 16 * high + low``, each of which stays packed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edge.errors import ConfigError

from .linears import linear_layers
from .manifest import FloatType, ModelSpec, SchemeKind, TensorScheme

GROUP_SIZES = (128, 64, 32)
"""Weights that share a scale: what TensorRT's INT4 block quantization was built with."""
HIGH_PLANE = 16
"""What one in the high plane counts; its scale is this many times the low plane's."""
PLANES_RANGE = (-128, 119)
"""Of the integers that are stored as planes: 7 in each is 119; joined they are INT8."""
PLANES_LEAST = -136
"""The least that two planes can hold; only layers with offsets (`LinearInfo.offsets`) reach it."""
INT4_GROUP_SIZE = 32
"""Of INT4 layers where nobody says: 128 loses three times as much (docs/quantization.md)."""
SCALE_BYTES = 2
"""Of a scale in a graph typed FP16 or BF16."""

Quant = Literal["fp16", "bf16", "int8", "int8-w8a8", "int4"]
Clip = Literal["absmax", "mse"]


@dataclass(frozen=True)
class SchemeFacts:
    """What all weights of one kind of scheme have in common.

    Attributes:
        kind: its name.
        weight_bits: bits of a stored weight, in a graph typed FP16 or BF16.
        group_sizes: weights that may share a scale, largest first; 0 is one scale per output
            channel. Empty for weights without scales.
        default_group_size: taken where nobody says; None is the largest that fits the model.
        int8_inputs: whether the layer's inputs are rounded to INT8 too, with one scale.
        planes: whether new bundles store it as two INT4 planes.
    """

    kind: SchemeKind
    weight_bits: int
    group_sizes: tuple[int, ...] = ()
    default_group_size: int | None = None
    int8_inputs: bool = False
    planes: bool = False


SCHEMES: dict[str, SchemeFacts] = {
    facts.kind: facts
    for facts in (
        SchemeFacts("float", 16),
        SchemeFacts("int8", 8, GROUP_SIZES, planes=True),
        SchemeFacts("int4", 4, GROUP_SIZES, INT4_GROUP_SIZE),
        SchemeFacts("w8a8", 8, (0,), int8_inputs=True),
    )
}

# INT4 in the lm_head, one matrix, adds up to two fifths to what all INT4 layers together lose
# (docs/quantization-measured.md). INT8 inputs are of no use in the lm_head, which runs for one of a
# prompt's tokens.
RULES: dict[Quant, tuple[tuple[str, SchemeKind], ...]] = {
    "fp16": (("*", "float"),),
    "bf16": (("*", "float"),),
    "int8": (("*", "int8"),),
    "int8-w8a8": (("*", "w8a8"), ("lm_head", "int8")),
    "int4": (("*", "int4"), ("lm_head", "int8")),
}
"""The scheme of the layers whose names match a shell wildcard; the last match wins."""


def fold_quant(name: str) -> str:
    """Write a precision as `RULES` has it: ``INT8_W8A8`` and ``w8a8`` are ``int8-w8a8``."""
    folded = name.strip().lower().replace("_", "-")
    return {"w8a8": "int8-w8a8", "float16": "fp16", "bfloat16": "bf16"}.get(folded, folded)


@dataclass(frozen=True)
class Recipe:
    """A quantization as asked for; `schemes` resolves it for a model.

    Attributes:
        quant: scheme of the linear layers, by `RULES`; ``fp16`` and ``bf16`` leave the weights as
            floats.
        group_size: weights that share a scale; None is 32 for INT4 layers, and for INT8 the largest
            of 128, 64, 32 that divides every layer's input width.
        keep: ``(pattern, scheme)`` overrides in the order given, the last match wins. The
            pattern is a shell wildcard on layer names, the scheme a key of `SCHEMES`, with a group
            size of its own as in ``int4-g64`` if ``group_size`` is not to decide.
        clip: how a group's scale is chosen.
    """

    quant: Quant
    group_size: int | None = None
    keep: tuple[tuple[str, str], ...] = ()
    clip: Clip = "mse"

    def schemes(self, model: ModelSpec) -> dict[str, TensorScheme]:
        """The scheme of every linear layer, by name and in the order of the graph.

        Raises:
            ConfigError: an unknown ``quant``, a group size that TensorRT or the model's shapes do
                not allow, a pattern that matches no layer, an unknown scheme, an option that no
                layer obeys.
        """
        rules = RULES.get(self.quant)
        if rules is None:
            raise ConfigError(f"--quant {self.quant} is unknown; use {' or '.join(RULES)}")
        if model.task == "embed":
            rules = tuple(rule for rule in rules if rule[0] != "lm_head")
        elif model.task == "rerank":
            rules = (*rules, ("lm_head", "float"))  # two rows: nothing to gain
        result = self._matching(model, (*rules, *self.keep))
        if all(scheme.kind == "float" for scheme in result.values()):
            self._refuse_idle_options()
        return result

    def overrides(self, model: ModelSpec) -> dict[str, TensorScheme]:
        """The schemes that ``keep`` alone gives to layers, by name; see `schemes`."""
        return self._matching(model, self.keep)

    def _matching(
        self, model: ModelSpec, rules: Sequence[tuple[str, str]]
    ) -> dict[str, TensorScheme]:
        layers = linear_layers(model)
        names = [layer.name for layer in layers]
        widths = {layer.name: layer.shape[0] for layer in layers}
        result: dict[str, TensorScheme] = {}
        for pattern, kind in rules:
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise ConfigError(
                    f"--keep {pattern}={kind} matches no linear layer; layers are named like "
                    f"{names[0]}, {names[3]} and {names[-1]}"
                )
            own = sorted({widths[name] for name in matching})
            scheme = self._scheme(kind, sorted(set(widths.values())), own)
            result.update(dict.fromkeys(matching, scheme))
        return result

    def _refuse_idle_options(self) -> None:
        for option, given in (
            (f"--group-size {self.group_size}", self.group_size is not None),
            ("--clip absmax", self.clip == "absmax"),
        ):
            if given:
                raise ConfigError(f"{option} has no effect: every layer stays float; leave it out")

    def _scheme(self, kind: str, widths: Sequence[int], own: Sequence[int]) -> TensorScheme:
        """A scheme as ``keep`` says it; an own group size must fit the ``own`` widths only."""
        name, grouped, size = kind.partition("-g")
        if name not in SCHEMES or (grouped and not re.fullmatch("[0-9]+", size)):
            *most, last = SCHEMES
            raise ConfigError(
                f"unknown scheme {kind!r}; use {', '.join(most)} or {last}, INT8 and INT4 also "
                "with a group size, as in int4-g64"
            )
        facts = SCHEMES[name]
        if not any(facts.group_sizes):  # no groups to choose
            if grouped:
                raise ConfigError(f"{kind}: {name} has no groups; say {name}")
            return TensorScheme(kind=facts.kind)
        if grouped:
            group = _group_size(facts, own, int(size), f"the group size of {kind}")
        else:
            group = _group_size(facts, widths, self.group_size, f"--group-size {self.group_size}")
        return TensorScheme(kind=facts.kind, group_size=group, planes=facts.planes)

    def export_options(self) -> list[str]:
        """The options of ``edge-llm export`` that ask for this recipe."""
        options = ["--quant", self.quant]
        if self.group_size is not None:
            options += ["--group-size", str(self.group_size)]
        for pattern, kind in self.keep:
            options += ["--keep", f"{pattern}={kind}"]
        return options if self.clip == "mse" else [*options, "--clip", self.clip]


def kind_of(scheme: str) -> str:
    """The kind of a scheme as ``keep`` says it, without a group size."""
    return scheme.partition("-g")[0]


def _group_size(facts: SchemeFacts, widths: Sequence[int], size: int | None, asked: str) -> int:
    """The group size that was asked for, or the default; it must divide all input widths."""
    fitting = [g for g in facts.group_sizes if g and all(width % g == 0 for width in widths)]
    if size is None:
        if not fitting:
            raise ConfigError(
                f"no group size of {GROUP_SIZES} divides the input widths {widths} of this model; "
                "use --quant fp16"
            )
        return facts.default_group_size or fitting[0]
    if size == 0:
        raise ConfigError(
            f"{facts.kind.upper()} needs groups: leave {asked} out, or use 128, 64 or 32"
        )
    if size not in fitting:
        raise ConfigError(
            f"{asked} does not fit: the input widths are {widths}, group sizes that fit are "
            f"{fitting}"
        )
    return size


def engine_dtype(scheme: TensorScheme, float_type: FloatType) -> str:
    """The type in which an engine stores the weights of a scheme, e.g. ``int4`` for both planes."""
    if scheme.planes:
        return "int4"
    return {"float": float_type, "w8a8": "int8"}.get(scheme.kind, scheme.kind)


def stored_bytes(shape: tuple[int, int], scheme: TensorScheme) -> tuple[int, int]:
    """Bytes of a weight ``[in, out]`` and of its scales, in a graph typed FP16 or BF16."""
    width, out = shape
    facts = SCHEMES[scheme.kind]
    weight = (width * out * facts.weight_bits + 7) // 8
    if not facts.group_sizes:
        return weight, 0
    groups = width // (scheme.group_size or width) * (2 if scheme.planes else 1)
    return weight, SCALE_BYTES * (groups * out + (1 if facts.int8_inputs else 0))
