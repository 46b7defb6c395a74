"""Summarises layers of a compiled engine as in ``engine.json``, and reads their profiles' names."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

AttentionKind = Literal["fused", "decomposed", "mixed", "own", "unknown"]
PROFILE_MARK = re.compile(r"\s*\[profile +(\d+)\]")
"""Matches the mark that TensorRT appends to layers' names in the second and later profiles."""


class ProfileLayers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Summary of the layers of one optimization profile.

    Attributes:
        profile: name of the profile.
        layers: number of layers.
        fused: layers that were made of several ONNX nodes.
        reformats: layers that only change a layout or a type.
        unpacking: layers that write packed weights as floats, every time that they run.
        products: matrix products by the type that they read.
        attention: ``fused`` (in one kernel), ``decomposed``, ``own`` (in plugins), ``mixed``, or
            ``unknown`` if no layer names attention's nodes.
        cache_copies: number of the reformats that copy the KV cache.
    """

    profile: str
    layers: int
    fused: int
    reformats: int
    unpacking: int
    products: dict[str, int]
    attention: AttentionKind
    cache_copies: int = 0


def plain_name(name: str) -> str:
    """Return a layer's name without the mark of its profile."""
    return PROFILE_MARK.sub("", name)
