"""Describes a manifest in lines for a person."""

from __future__ import annotations

import msgspec

from edge.bundle.manifest import Manifest, SamplingDefaults


def describe_sampling(sampling: SamplingDefaults) -> str:
    """Write a line for a person, e.g. ``temperature 0.6, ..., assumed (DeepSeek-R1)``."""
    values = msgspec.structs.asdict(sampling)
    assumed = values.pop("assumed")
    parts = [f"{name} {value:g}" for name, value in values.items()]
    return ", ".join(parts if assumed is None else [*parts, f"assumed ({assumed})"])


def describe_from_source(manifest: Manifest) -> str | None:
    """Say in a line what became of a quantized checkpoint; None for a float one."""
    quantized = manifest.source.quantization
    if quantized is None:
        return None
    line = f"{quantized.method}, {quantized.details}"
    if manifest.quantization.name != "source":
        return f"{line}; dequantized, then exported as {manifest.quantization.name}"
    found = [
        linear.from_source
        for linear in manifest.quantization.linears.values()
        if linear.from_source is not None
    ]
    parts = []
    for treatment, words in (
        ("kept", "kept code for code"),
        ("requantized", "rounded anew"),
        ("dequantized", f"dequantized to {manifest.dtype}"),
    ):
        those = [each for each in found if each.treatment == treatment]
        if not those:
            continue
        part = f"{len(those)} of {len(found)} layers {words}"
        if changed := sum(each.changed_groups for each in those):
            worst = max(each.relative_error for each in those)
            part += (
                f" ({changed:,} of {sum(each.groups for each in those):,} groups changed, relative "
                f"error at most {worst:.2g})"
            )
        if notes := sorted({each.note for each in those if each.note is not None}):
            part += f": {', '.join(notes)}"
        parts.append(part)
    return "; ".join([line, *parts])


def describe_kv_cache(manifest: Manifest) -> str:
    """Describe the KV cache in a phrase, e.g. ``int8, layers 0, 27 in float``.

    Which float is the backend's choice: FP16 on a GPU, FP32 on the CPU.
    """
    found = manifest.kv_cache
    if found is None:
        return "float"
    kept = ", ".join(map(str, found.float_layers))
    return f"{found.kind}, layers {kept} in float" if kept else found.kind


def describe_vision(manifest: Manifest) -> str | None:
    """Describe in a line the pictures that a model reads; None for one of text alone."""
    if "vision" not in manifest.extras:  # do not import for a text bundle what comes next
        return None
    from edge.vision.section import read_vision

    section = read_vision(manifest)
    assert section is not None
    loss = "" if section.loss is None else f", which changes rows by {section.loss:.2%}"
    return (
        f"{section.family}, at most {section.max_tiles} tiles of {section.tile_px} px, "
        f"{section.rows_per_tile} rows each; encoder in {section.quant}{loss}"
    )


def describe_tensorrt(manifest: Manifest) -> str:
    """Say in a line which versions take the graph, e.g. ``legal for 10.16, 11.1``."""
    if manifest.tensorrt is None:
        return "not checked at export (edge-llm check BUNDLE --trt all)"
    versions = ", ".join(manifest.tensorrt) or "none"
    return f"legal for {versions} (edge-llm check BUNDLE --trt all says why)"
