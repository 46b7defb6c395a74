"""Says in sentences why an engine is slow, from the layers that TensorRT made of it."""

from __future__ import annotations

from collections.abc import Iterable

from edge.bundle.engine_file import EngineInfo


def slow_parts(info: EngineInfo) -> tuple[str, ...]:
    """List what costs an engine speed; empty if nothing is seen or its layers are not known.

    Args:
        info: its ``engine.json``.
    """
    unpacking = {each.profile: each.unpacking for each in info.compiled if each.unpacking}
    apart = [each.profile for each in info.compiled if each.attention in ("decomposed", "mixed")]
    copies = {each.profile: each.cache_copies for each in info.compiled if each.cache_copies}
    found = []
    if unpacking:
        found.append(
            f"{max(unpacking.values())} layers unpack their weights into floats in every step "
            f"({_names(unpacking)}), so few bits save no time"
        )
    if apart:
        found.append(f"attention is several kernels, which write its scores ({_names(apart)})")
    if copies:
        found.append(
            f"{max(copies.values())} layers copy the KV cache into another layout "
            f"({_names(copies)})"
        )
    return tuple(found)


def how_to_mend(info: EngineInfo) -> str:
    """Say what to do about the parts that `slow_parts` lists.

    Args:
        info: the engine's ``engine.json``.
    """
    tried = [each.kernels for each in info.tuned] + [each.kernels for each in info.refused]
    if "own" in tried:
        return "edge-llm inspect BUNDLE/engines/NAME has what came of edge-llm's own kernels"
    if info.flavour == "tensorrt" and info.kernels == "tensorrt" and info.builder == "api":
        return "edge-llm build BUNDLE --kernels auto tries edge-llm's own kernels, too"
    if info.flavour == "tensorrt" and info.builder == "trtexec":
        return "edge-llm build BUNDLE without --with trtexec tries edge-llm's own kernels, too"
    return "edge-llm inspect BUNDLE/engines/NAME --layers lists all layers"


def describe_slowness(info: EngineInfo) -> str | None:
    """`slow_parts` and what to do, in one sentence; None where nothing is slow.

    Args:
        info: the engine's ``engine.json``.
    """
    found = slow_parts(info)
    if not found:
        return None
    return f"the engine is slower than it could be: {'; '.join(found)}; {how_to_mend(info)}"


def _names(profiles: Iterable[str]) -> str:
    return ", ".join(profiles)
