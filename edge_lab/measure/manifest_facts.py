"""Checks the numbers that a manifest repeats: counts them again or reads them at their source."""

from __future__ import annotations

from pathlib import Path

from edge.bundle.graph_scales import read_graph_scales
from edge.bundle.kv_scales import read_scales, scales_sha256
from edge.bundle.manifest import Manifest
from edge.bundle.memory_facts import PARTS, MemoryFacts, read_memory_facts
from edge.bundle.weights import count_facts, manifest_linears
from edge.errors import BundleError

_TOLERANCE = 0.05  # a later edge-llm, which measured anew, may count this much differently


def check_facts(bundle: Path, manifest: Manifest) -> None:
    """Count the memory of a bundle's weights again, and compare its KV scales with both graphs.

    Args:
        bundle: directory of the bundle.
        manifest: its manifest.

    Raises:
        BundleError: the manifest says something else.
        IntegrityError: a graph is damaged.
    """
    said = read_memory_facts(manifest)
    found = count_facts(manifest.model, manifest_linears(manifest), manifest.rope_positions)
    for name, number in _numbers(found).items():
        other = _numbers(said)[name]
        if abs(other - number) > _TOLERANCE * number:
            raise BundleError(
                f"{bundle}: the manifest says that {name} takes {other:,} bytes, its layers add up "
                f"to {number:,}; export the bundle again"
            )
    for graph in (manifest.graphs.decoder, manifest.graphs.cpu) if manifest.int8_layers else ():
        own = scales_sha256(read_scales(bundle, manifest, graph))
        if own != scales_sha256(read_graph_scales(bundle, manifest, graph)):
            raise BundleError(
                f"{bundle}: the manifest has other scales of the KV cache than {graph}; export "
                "the bundle again"
            )


def _numbers(facts: MemoryFacts) -> dict[str, int]:
    """Give each number a name; a part that is not listed takes no memory."""
    numbers = {f"{part} of an engine": facts.weights.get(part, 0) for part in PARTS}
    numbers |= {f"{part} on the CPU": facts.host.get(part, 0) for part in PARTS}
    return {**numbers, "loading on the CPU": facts.host_loading_bytes}
