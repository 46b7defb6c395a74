"""What a bundle's weights take of memory: numbers that its exporter counted, in the manifest.

Of a bundle from before they are counted from its linear layers (`weights.count_facts`). What grows
with slots and steps follows from the model's dimensions: the cache by `io_spec.kv_bytes_per_token`,
the rest by `edge.backends.host_memory` and `edge_lab.planner.memory`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .extras import read_extra
from .manifest import Count, HeadManifest, Manifest

SECTION = "memory"
"""Of the manifest, see `read_memory_facts`."""
Part = Literal["attention", "mlp", "lm_head", "scales", "norms", "rope"]
PARTS: tuple[Part, ...] = ("attention", "mlp", "lm_head", "scales", "norms", "rope")


class MemoryFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of a bundle's weights.

    Attributes:
        weights: by part, as they are stored, and as an engine holds them.
        host: by part, in ONNX Runtime on the CPU: floats in FP32, integers packed.
        host_loading_bytes: what ONNX Runtime takes besides while it loads them.
    """

    weights: dict[Part, Count]
    host: dict[Part, Count]
    host_loading_bytes: Count


def read_memory_facts(manifest: Manifest, beside: Manifest | None = None) -> MemoryFacts:
    """Read what a bundle's weights take.

    Args:
        manifest: of the bundle, or of its head.
        beside: of what drafts for it; a head adds a product to its graph (`manifest_linears`).

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
