"""Defines the parts of a decoder layer.

A layer is a tuple of parts, read like a short program. It has a residual stream, which begins as
the layer's input ``[B, S, hidden]``, a running value, which begins as that stream, and a few values
by name. Each part takes the running value and leaves a new one, unless its class says otherwise.
The last part is an `Add`, whose result is the layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal, NoReturn, TypeVar

import msgspec

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Rows = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]  # of a token table; ids are below it
Heads = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,39}\Z")]
MOST_OUTPUTS = 8
"""Limits the modules that are fused into one matrix."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="part"):
    """Base of the parts; ``part`` names the kind in a manifest."""


class Norm(Part, frozen=True, tag="norm"):
    """An RMSNorm over the last axis, computed in fp32.

    Attributes:
        name: its name in the layer.
        size: width of what it normalizes.
        of: the value whose heads it normalizes one by one and replaces; None for the running value.
    """

    name: Name
    size: Size
    of: Name | None = None


class Linear(Part, frozen=True, tag="linear"):
    """One or more linear layers of the same input, fused into one matrix.

    Attributes:
        name: its name in the layer.
        width: width of the input.
        outputs: name and width of each output. A single one is the new running value; several are
            values by name, and the running value ends.
        bias: whether each has a bias.
    """

    name: Name
    width: Size
    outputs: Annotated[
        tuple[tuple[Name, Size], ...], msgspec.Meta(min_length=1, max_length=MOST_OUTPUTS)
    ]
    bias: bool = False


class Rope(Part, frozen=True, tag="rope"):
    """Rotates the heads of ``q`` and ``k`` by their positions, halves paired (HF's layout).

    Attributes:
        dims: leading dimensions of a head that turn.
        table: number of its frequencies in ``ModelSpec.ropes``.
    """

    dims: Heads
    table: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0


class Attention(Part, frozen=True, tag="attention"):
    """Causal attention of ``q`` to ``k`` and ``v``, whose rows it keeps in a cache.

    It leaves the heads side by side, ``[B, S, heads * dim]``.

    Attributes:
        heads, kv_heads: query heads, and heads of keys and values.
        dim: size of a head.
        scale: factor on the scores; None is ``dim ** -0.5``.
    """

    heads: Heads
    kv_heads: Heads
    dim: Heads
    scale: Annotated[float, msgspec.Meta(gt=0, le=1e3)] | None = None

    @property
    def factor(self) -> float:
        """Return the factor on the scores."""
        return 1.0 / math.sqrt(self.dim) if self.scale is None else self.scale


class GatedMlp(Part, frozen=True, tag="gated_mlp"):
    """Multiplies ``up`` by the activation of ``gate``."""

    activation: Literal["silu"] = "silu"


class Add(Part, frozen=True, tag="add"):
    """Adds the running value to the residual stream, from which the next part goes on."""

    name: Name


AnyPart = Norm | Linear | Rope | Attention | GatedMlp | Add
Layer = Annotated[tuple[AnyPart, ...], msgspec.Meta(min_length=1, max_length=32)]
_P = TypeVar("_P", bound=Part)


def only(layer: Iterable[Part], kind: type[_P]) -> list[_P]:
    """Return the parts of a layer that are of one kind."""
    return [part for part in layer if isinstance(part, kind)]


def unknown_part(part: NoReturn) -> NoReturn:
    """Refuse a kind of part that a ``match`` has no case for; mypy finds it before it is run."""
    raise AssertionError(f"no code for the part {part!r}")


def widest(layer: Iterable[Part]) -> int:
    """Return the values of a token that the widest linear of a layer puts out."""
    sums = (sum(width for _, width in part.outputs) for part in only(layer, Linear))
    return max(sums, default=0)
