"""``edge-llm inspect BUNDLE/engines/NAME``: what an engine is, from its ``engine.json``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from edge.bundle.engine_file import EngineInfo, WeightBytes, read_engine_info, verify_plan
from edge.bundle.manifest import MANIFEST_NAME, Manifest, read_manifest

from . import echo_json

_BITS = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16}


def inspect_engine(directory: Path, as_json: bool, layers: bool, verify: bool) -> None:
    """Print an engine's record.

    Args:
        directory: the engine's directory.
        as_json: one line of JSON instead of tables.
        layers: list the parsed network's layers too.
        verify: hash the plan first.

    Raises:
        BundleError: no engine, or a damaged one.
    """
    info = read_engine_info(directory)
    if verify:
        verify_plan(directory, info)
    bundle = directory.resolve().parent.parent
    manifest = read_manifest(bundle) if (bundle / MANIFEST_NAME).is_file() else None
    as_exported = weights_as_exported(info, manifest) if manifest else None
    if as_json:
        summary = msgspec.to_builtins(info)
        echo_json({**summary, "weights_as_exported": as_exported, "verified": verify})
        return
    _print(directory, info, layers, verify, as_exported)


def weights_as_exported(info: EngineInfo, manifest: Manifest) -> bool | None:
    """Return whether the engine stores every linear layer in the type that the bundle does.

    None if the build could not look at the network (``trtexec``).
    """
    if not info.weights:
        return None
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for linear in manifest.quantization.linears.values():
        dtype = manifest.dtype if linear.scheme.kind == "float" else linear.scheme.kind
        counts[dtype] += 1
        sizes[dtype] += linear.shape[0] * linear.shape[1] * _BITS[dtype] // 8
    expected = {WeightBytes(dtype, counts[dtype], sizes[dtype]) for dtype in counts}
    return set(info.weights) == expected


def _print(
    directory: Path, info: EngineInfo, layers: bool, verified: bool, as_exported: bool | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # a path may hold brackets
    stored = sum(weight.num_bytes for weight in info.weights)
    facts = Table(title=str(directory), title_justify="left", box=None, show_header=False)
    verdict = {True: "yes", False: "NO: build the engine again", None: "not known"}[as_exported]
    jetson = f", JetPack {info.jetpack}, L4T {info.l4t}" if info.l4t else ""
    peak = f", peak memory {info.peak_memory_bytes / 1e9:.2f} GB" if info.peak_memory_bytes else ""
    for name, value in (
        ("built", f"{info.created} by {info.producer} ({info.builder})"),
        ("TensorRT", f"{info.flavour} {info.tensorrt_version}"),
        ("GPU", f"sm {info.compute_capability}, {info.device or 'compiled without one'}{jetson}"),
        ("took", f"{info.build_s:.0f} s{peak}"),
        ("batch", f"up to {info.max_batch}"),
        ("prefill", f"up to {info.max_prefill} tokens per step"),
        ("KV cache", f"{info.kv_capacity} rows, read as {info.kv_read}"),
        ("KV buckets", ", ".join(map(str, info.kv_buckets))),
        ("plan", f"{info.plan}, {info.plan_bytes:,} bytes"),
        ("plan hash", "matches" if verified else "not verified"),
        ("weights as exported", verdict),
    ):
        facts.add_row(name, value)
    console.print(facts, "")
    parts = Table(title="Bytes", title_justify="left", box=None)
    parts.add_column("part")
    parts.add_column("layers", justify="right")
    parts.add_column("bytes", justify="right")
    for weight in info.weights:
        parts.add_row(f"{weight.dtype} weights", str(weight.count), f"{weight.num_bytes:,}")
    parts.add_row("scales, norms, tables, kernels", "", f"{info.plan_bytes - stored:,}")
    console.print(parts)
    if layers:
        table = Table(title="Layers of the parsed network", title_justify="left", box=None)
        for column in ("kind", "type", "count"):
            table.add_column(column, justify="right" if column == "count" else "left")
        for layer in info.layers:
            table.add_row(layer.kind, layer.dtype, str(layer.count))
        console.print("", table)
