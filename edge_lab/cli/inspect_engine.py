"""``edge-llm inspect BUNDLE/engines/NAME``: what an engine is, from its ``engine.json``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from edge.bundle.engine_file import (
    EngineInfo,
    TunedRung,
    WeightBytes,
    decode_engine_info,
    read_engine_bytes,
    rebuild_command,
)
from edge.bundle.engine_records import UnvouchedError, who_vouches
from edge.bundle.manifest import MANIFEST_NAME, Manifest, read_manifest
from edge.bundle.profile_layers import ProfileLayers
from edge.bundle.trust import trusted_keys_file
from edge.cli import echo_json
from edge_make.engine_layers import LayerTable, engine_dtype, read_layers
from edge_make.engine_record import verify_plan
from edge_make.engine_verdict import slow_parts

_BITS = {"int4": 4, "int8": 8, "fp16": 16, "bf16": 16}


def inspect_engine(directory: Path, as_json: bool, layers: bool, verify: bool) -> None:
    """Print an engine's record.

    Args:
        directory: the engine's directory.
        as_json: one line of JSON instead of tables.
        layers: list the layers of the parsed network and of the engine too.
        verify: hash the plan first.

    Raises:
        BundleError: no engine, or a damaged one.
    """
    data = read_engine_bytes(directory)
    info = decode_engine_info(directory, data)
    policy, vouched = trusted_keys_file(), "nobody is asked: no keys are trusted here"
    if policy is not None:
        try:
            vouched = who_vouches(directory, data, policy)
        except UnvouchedError as error:
            vouched = f"NOBODY: {error}"
    if verify:
        verify_plan(directory, info)
    bundle = directory.resolve().parent.parent
    manifest = read_manifest(bundle) if (bundle / MANIFEST_NAME).is_file() else None
    as_exported = weights_as_exported(info, manifest) if manifest else None
    table = read_layers(directory / info.plan) if layers else None
    if as_json:
        summary = {
            **msgspec.to_builtins(info),
            "weights_as_exported": as_exported,
            "slow": list(slow_parts(info)),
            "verified": verify,
            "vouched_for_by": vouched,
        }
        del summary["python_kernels"]  # code
        if layers:
            summary["layer_table"] = msgspec.to_builtins(table)
        echo_json(summary)
        return
    _print(directory, info, layers, verify, as_exported, vouched)
    if layers:
        _print_layers(table, why_unknown(directory, info))


def why_unknown(directory: Path, info: EngineInfo) -> str:
    """Say why an engine has no table of its layers, and how to make one."""
    reason = info.compiled_unknown or "an older edge-llm built the engine, or its file is gone"
    return f"not known: {reason}; build it on its device: {rebuild_command(directory, info)}"


def weights_as_exported(info: EngineInfo, manifest: Manifest) -> bool | None:
    """Return whether the engine stores every linear layer in the type that the bundle does.

    None if the build could not look at the network (``trtexec``).
    """
    if not info.weights:
        return None
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for linear in manifest.quantization.linears.values():
        dtype = engine_dtype(linear.scheme, manifest.dtype)
        planes = 2 if linear.scheme.planes else 1
        counts[dtype] += planes
        sizes[dtype] += planes * linear.shape[0] * linear.shape[1] * _BITS[dtype] // 8
    expected = {WeightBytes(dtype, counts[dtype], sizes[dtype]) for dtype in counts}
    return set(info.weights) == expected


def describe_profile(found: ProfileLayers) -> str:
    """Describe a profile's layers in one line."""
    products = ", ".join(f"{count} {dtype}" for dtype, count in found.products.items())
    text = (
        f"{found.layers} layers, {found.fused} of several nodes, {found.reformats} reformats; "
        f"matrix products: {products or 'none seen'}; attention {found.attention}"
    )
    if found.unpacking:
        text += f"; {found.unpacking} layers UNPACK weights each time"
    return text


def describe_trial(tried: TunedRung) -> str:
    """Describe how the trial of a variant ended."""
    if tried.decode_s is None:
        return tried.problem or "not timed"
    text = f"{tried.decode_s * 1e3:.2f} ms per decode step"
    return text if tried.prefill_s is None else f"{text}, {tried.prefill_s * 1e3:.0f} ms of prefill"


def _clocks(info: EngineInfo) -> list[tuple[str, str]]:
    if info.gpu_clocks_hz is None:
        return []
    low, high = (f"{clock / 1e6:.0f}" for clock in info.gpu_clocks_hz)
    clocks = f"{low} to {high} MHz, by load" if low != high else f"{high} MHz"
    return [("GPU clock", f"{clocks}, power mode {info.power_mode or 'unknown'}")]


def _own_kernels(info: EngineInfo) -> list[tuple[str, str]]:
    if info.kernels != "own":
        return []
    left = [(f"left to TensorRT {name}", reason) for name, reason in info.left_linears.items()]
    attentions = f", {len(info.own_attentions)} attentions" if info.own_attentions else ""
    top_k = ", best logits" if info.own_top_k else ""
    how = ", launched by Python" if info.plugins == "python" else ""
    return [
        ("own kernels", f"{len(info.own_linears)} linear layers{attentions}{top_k}{how}"),
        *left,
    ]


def _beside(info: EngineInfo) -> list[tuple[str, str]]:
    if info.outside is None:
        return []
    size, count = info.outside.num_bytes, len(info.outside.tensors)
    return [("weights beside it", f"{info.outside.file}, {size:,} bytes, {count} tensors")]


def _compiled_facts(directory: Path, info: EngineInfo) -> list[tuple[str, str]]:
    if not info.compiled:
        return [("compiled layers", why_unknown(directory, info))]
    return [
        *((f"compiled {each.profile}", describe_profile(each)) for each in info.compiled),
        *(("SLOW", part) for part in slow_parts(info)),
    ]


def _print_layers(table: LayerTable | None, unknown: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if table is None:
        console.print("", f"Layers of the engine: {unknown}", sep="\n", soft_wrap=True)
        return
    for profile in table.profiles:
        shown = Table(title=f"Layers of the engine, {profile}", title_justify="left", box=None)
        for column in ("kind", "type", "nodes", "layer", "kernel"):
            shown.add_column(
                column, overflow="fold", justify="right" if column == "nodes" else "left"
            )
        for layer in table.of(profile):
            kind = f"{layer.kind} UNPACKS" if layer.unpacks else layer.kind
            shown.add_row(kind, layer.dtype, str(len(layer.nodes)), layer.name, layer.tactic)
        console.print("", shown)


def _print(
    directory: Path,
    info: EngineInfo,
    layers: bool,
    verified: bool,
    as_exported: bool | None,
    vouched: str,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # a path may hold brackets
    stored = sum(weight.num_bytes for weight in info.weights)
    facts = Table(title=str(directory), title_justify="left", box=None, show_header=False)
    verdict = {True: "yes", False: "NO: build the engine again", None: "not known"}[as_exported]
    jetson = f", JetPack {info.jetpack}, L4T {info.l4t}" if info.l4t else ""
    on = f", {info.num_sms} multiprocessors on" if info.num_sms else ""
    peak = f", peak memory {info.peak_memory_bytes / 1e9:.2f} GB" if info.peak_memory_bytes else ""
    for name, value in (
        ("built", f"{info.created} by {info.producer} ({info.builder})"),
        ("TensorRT", f"{info.flavour} {info.tensorrt_version}"),
        (
            "GPU",
            f"sm {info.compute_capability}, {info.device or 'compiled without one'}{on}{jetson}",
        ),
        ("took", f"{info.build_s:.0f} s{peak}"),
        *((("not tried", str(info.skipped_tactics)),) if info.skipped_tactics else ()),
        *_clocks(info),
        ("batch", f"up to {info.max_batch}"),
        ("prefill", f"up to {info.max_prefill} tokens per step"),
        ("KV cache", f"{info.kv_capacity} rows, read as {info.kv_read}"),
        ("attention", info.attention or "not TensorRT's own, or not recorded"),
        *([("scales of INT8 inputs", "widened to FP32")] if info.scales == "fp32" else []),
        *_own_kernels(info),
        *((f"refused {each.label}", each.reason) for each in info.refused),
        *((f"tried {each.label}", describe_trial(each)) for each in info.tuned),
        ("KV buckets", ", ".join(map(str, info.kv_buckets))),
        ("plan", f"{info.plan}, {info.plan_bytes:,} bytes"),
        *_beside(info),
        ("plan hash", "matches" if verified else "not verified"),
        ("vouched for by", vouched),
        ("weights as exported", verdict),
        *_compiled_facts(directory, info),
    ):
        facts.add_row(name, value)
    console.print(facts, "")
    parts = Table(title="Bytes", title_justify="left", box=None)
    parts.add_column("part")
    parts.add_column("layers", justify="right")
    parts.add_column("bytes", justify="right")
    for weight in info.weights:
        parts.add_row(f"{weight.dtype} weights", str(weight.count), f"{weight.num_bytes:,}")
    parts.add_row("scales, norms, tables, kernels", "", f"{info.weights_bytes - stored:,}")
    console.print(parts)
    if layers:
        table = Table(title="Layers of the parsed network", title_justify="left", box=None)
        for column in ("kind", "type", "count"):
            table.add_column(column, justify="right" if column == "count" else "left")
        for layer in info.layers:
            table.add_row(layer.kind, layer.dtype, str(layer.count))
        console.print("", table)
