"""Follows the parts of a layer: what feeds each of its linears, and where their results go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge.errors import CheckpointError
from edge.model.parts import (
    Add,
    AnyPart,
    Attention,
    GatedMlp,
    Layer,
    Linear,
    Norm,
    Rope,
    only,
    unknown_part,
)
from edge.model.spec import ModelSpec


@dataclass(frozen=True)
class FedLinear:
    """A linear of a layer, and the parts around it.

    Attributes:
        part: the linear.
        source: the part that makes its inputs; None for the layer's input itself.
        add: the part that adds its result to the residual stream, or None.
        producer: name of the norm, or of an earlier linear's output, whose channels can be divided
            by factors that multiply the linear's input channels; None if nothing can take them.
    """

    part: Linear
    source: AnyPart | None
    add: Add | None
    producer: str | None

    @property
    def value(self) -> str:
        """Return the name within the layer's graph of the value that feeds it.

        Raises:
            CheckpointError: it reads the residual stream itself.
        """
        if self.source is None or isinstance(self.source, Add):
            raise CheckpointError(
                f"{self.part.name} reads the residual stream without a norm between, which "
                "calibration does not support; export with --method rtn"
            )
        return value_name(self.source)


def value_name(part: AnyPart) -> str:
    """Return the name within a layer's graph of a part's running value; empty if it leaves none."""
    match part:
        case Norm(of=None) | Linear():
            return f"{part.name}.out"
        case Attention():
            return "merged"
        case GatedMlp():
            return "gated"
        case Add():
            return part.name
        case Norm() | Rope():
            pass
        case _:
            unknown_part(part)
    return ""


def neighbours(layer: Layer) -> Iterator[tuple[AnyPart | None, AnyPart, AnyPart | None]]:
    """Yield each part that leaves a running value between the one before and the one after it."""
    chain = [part for part in layer if value_name(part)]
    return zip([None, *chain], chain, [*chain[1:], None], strict=False)


def fed_linears(layer: Layer) -> list[FedLinear]:
    """List the linears of a layer in their order."""
    normed = {norm.of for norm in only(layer, Norm)}  # a norm would undo what divides its input
    found = []
    for before, part, after in neighbours(layer):
        if isinstance(part, Linear):
            producer = None
            match before:
                case Norm():
                    producer = before.name
                case Attention() if "v" not in normed:
                    producer = "v"
                case GatedMlp() if "up" not in normed:
                    producer = "up"
            add = after if isinstance(after, Add) else None
            found.append(FedLinear(part, before, add, producer))
    return found


def fed_linear(model: ModelSpec, name: str) -> FedLinear | None:
    """Find a linear by its name in the graph, e.g. ``layers.0.qkv``; None for the lm_head."""
    if name == "lm_head":
        return None
    _, number, short = name.split(".")
    return next(each for each in fed_linears(model.layer(int(number))) if each.part.name == short)
