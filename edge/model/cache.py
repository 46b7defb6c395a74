"""Describes a model's cache, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Literal, TypeVar

import msgspec

from edge.errors import ConfigError

from .parts import Attention, Heads, Size, only
from .spec import ModelSpec

ElementType = Literal["fp16", "bf16", "fp32", "int64", "int32", "int8"]
ELEMENT_BYTES: dict[ElementType, int] = {
    "fp16": 2, "bf16": 2, "fp32": 4, "int64": 8, "int32": 4, "int8": 1,
}  # fmt: skip
_Dim = TypeVar("_Dim", int, int | str)


class Rows(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="rows"):
    """A row for each token: the keys or the values of an attention.

    Attributes:
        kv_heads, dim: heads, and the size of each.
        type: type of the elements.
        window: how many of the newest rows attention reads; 0 is all.
    """

    kv_heads: Heads
    dim: Heads
    type: ElementType
    window: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0

    can_cut = can_rewind = True

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a token."""
        return self.kv_heads * self.dim * ELEMENT_BYTES[self.type]

    def shape(self, batch: _Dim, length: _Dim) -> tuple[int | _Dim, ...]:
        """Return the shape of a tensor with ``length`` rows of each sequence."""
        return batch, self.kv_heads, length, self.dim


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="state"):
    """Holds what a layer keeps of all tokens so far, of a size that does not grow."""

    sizes: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=4)]
    type: ElementType

    can_cut = can_rewind = False
    row_bytes = 0

    def shape(self, batch: _Dim, length: _Dim) -> tuple[int | _Dim, ...]:
        """Return the shape of a tensor, which no length changes."""
        return batch, *self.sizes


CacheSpec = Rows | State


def cache_tensors(
    model: ModelSpec, dtype: ElementType, int8_layers: Collection[int] = ()
) -> dict[str, CacheSpec]:
    """Return the cache tensors by name, in graph order: ``0.key``, ``0.value``, ``1.key``, ...

    Args:
        model: the model.
        dtype: type of the elements of a cache in floats.
        int8_layers: layers whose cache is in 8 bits.
    """
    found: dict[str, CacheSpec] = {}
    for layer, parts in model.each_layer():
        kind: ElementType = "int8" if layer in int8_layers else dtype
        for part in only(parts, Attention):
            found[f"{layer}.key"] = found[f"{layer}.value"] = Rows(part.kv_heads, part.dim, kind)
    return found


def alike(tensors: Mapping[str, CacheSpec]) -> list[tuple[list[str], CacheSpec]]:
    """Group the names of tensors that have the same spec."""
    groups: dict[CacheSpec, list[str]] = {}
    for name, spec in tensors.items():
        groups.setdefault(spec, []).append(name)
    return [(names, spec) for spec, names in groups.items()]


def check_cache(
    tensors: Mapping[str, CacheSpec], need: Literal["can_cut", "can_rewind"], what: str
) -> None:
    """Refuse ``what`` for a cache of which a tensor cannot be cut or rewound.

    Raises:
        ConfigError: there is such a tensor.
    """
    for name, spec in tensors.items():
        if not getattr(spec, need):
            raise ConfigError(f"{what} is impossible: the cache {name} is a state, not rows")
