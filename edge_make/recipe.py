"""Recipes: a quantization as the user asks for it, and the scheme that each layer gets."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from edge.bundle.quant_rules import RULES, Quant, fold_quant
from edge.bundle.schemes import GROUP_SIZES, SCHEMES, SchemeFacts
from edge.bundle.weights import Linear
from edge.errors import ConfigError
from edge.model.spec import ModelSpec

Clip = Literal["absmax", "mse"]


@dataclass(frozen=True)
class Recipe:
    """A quantization as the user asks for it; `schemes` resolves it for a model.

    Attributes:
        quant: scheme of the linear layers, by `RULES`; ``fp16`` and ``bf16`` leave the weights as
            floats.
        group_size: weights that share a scale; None is 32 for INT4 layers, and for INT8 the largest
            of 128, 64, 32 that divides every layer's input width.
        keep: ``(pattern, scheme)`` overrides in the order given; the last match wins. The pattern
            is a shell wildcard on layer names. The scheme is a key of `SCHEMES`, with a group size
            of its own as in ``int4-g64`` if ``group_size`` is not to decide.
        clip: how a group's scale is chosen.
    """

    quant: Quant
    group_size: int | None = None
    keep: tuple[tuple[str, str], ...] = ()
    clip: Clip = "mse"

    def schemes(self, model: ModelSpec) -> dict[str, TensorScheme]:
        """Resolve the scheme of every linear layer, by name and in the order of the graph.

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
            rules = (*rules, ("lm_head", "float"))  # an lm_head of two rows: nothing to gain
        result = self._matching(model, (*rules, *self.keep))
        if all(scheme.kind == "float" for scheme in result.values()):
            self._refuse_idle_options()
        return result

    def overrides(self, model: ModelSpec) -> dict[str, TensorScheme]:
        """Return the schemes that ``keep`` alone gives to layers, by name."""
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
        """Resolve a scheme of ``keep``; its own group size must fit only the ``own`` widths."""
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
        """Return the options of ``edge-llm export`` that ask for this recipe."""
        options = ["--quant", self.quant]
        if self.group_size is not None:
            options += ["--group-size", str(self.group_size)]
        for pattern, kind in self.keep:
            options += ["--keep", f"{pattern}={kind}"]
        return options if self.clip == "mse" else [*options, "--clip", self.clip]


def kind_of(scheme: str) -> str:
    """Return the kind of a scheme of ``keep``, without a group size."""
    return scheme.partition("-g")[0]


def _group_size(facts: SchemeFacts, widths: Sequence[int], size: int | None, asked: str) -> int:
    """Return the group size asked for, or the default; it must divide all input widths."""
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


VARIANTS: dict[str, Recipe] = {
    "fp16": Recipe("fp16"),
    "int8": Recipe("int8"),
    "int8-w8a8": Recipe("int8-w8a8"),
    "int4": Recipe("int4"),
    "int4-g128": Recipe("int4", 128),
    "int4-head-fp16": Recipe("int4", keep=(("lm_head", "float"),)),
    "int4-head-int4": Recipe("int4", keep=(("lm_head", "int4"),)),
}
"""Recipes that a plan shows side by side, by the names that the user sees."""


def find_variant(name: str) -> Recipe:
    """Find a recipe of `VARIANTS` by its name, in any spelling of `fold_quant`.

    Raises:
        ConfigError: there is none of that name.
    """
    recipe = VARIANTS.get(fold_quant(name))
    if recipe is None:
        raise ConfigError(f"--quant {name} is unknown; known: {', '.join(VARIANTS)}")
    return recipe


def recipe_linears(model: ModelSpec, recipe: Recipe) -> list[Linear]:
    """List the linear layers of a model in a quantization.

    Raises:
        ConfigError: `Recipe.schemes` refuses the recipe for this model.
    """
    schemes = recipe.schemes(model)
    return [Linear(layer.name, layer.shape, schemes[layer.name]) for layer in linear_layers(model)]
