"""Reads how much memory a bundle's weights take: numbers that its exporter put into the manifest.

For a bundle from before that, they are counted from its linear layers (`weights.count_facts`).
Memory that grows with slots and steps follows from the model's dimensions: the cache by
`io_spec.kv_bytes_per_token`, the rest by `edge.backends.host_memory` and
`edge_lab.planner.memory`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .extras import read_extra
from .manifest import Count, HeadManifest, Manifest

SECTION = "memory"
"""Names the manifest's section, which `read_memory_facts` reads."""
Part = Literal["attention", "mlp", "lm_head", "scales", "norms", "rope"]
PARTS: tuple[Part, ...] = ("attention", "mlp", "lm_head", "scales", "norms", "rope")


class MemoryFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of a bundle's weights.

    Attributes:
        weights: bytes by part, as they are stored and as an engine holds them.
        host: bytes by part in ONNX Runtime on the CPU: floats in FP32, integers packed.
        host_loading_bytes: extra bytes that ONNX Runtime takes while it loads them.
    """

    weights: dict[Part, Count]
    host: dict[Part, Count]
    host_loading_bytes: Count


def read_memory_facts(manifest: Manifest, beside: Manifest | None = None) -> MemoryFacts:
    """Read how many bytes a bundle's weights take.

    Args:
        manifest: manifest of the bundle, or of its head.
        beside: manifest of the head that drafts for it, which adds a product to its graph
            (`manifest_linears`); None without one.

    Raises:
        BundleError: the section does not fit.
    """
    stored = None
    if not isinstance(manifest, HeadManifest) and not isinstance(beside, HeadManifest):
        stored = read_extra(manifest, SECTION, MemoryFacts)
    if stored is None:
        from .weights import count_facts, manifest_linears

        linears = manifest_linears(manifest, beside)
        return count_facts(manifest.model, linears, manifest.rope_positions)
    return stored
