"""``edge-llm inspect``: what a bundle or one of its engines is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
import msgspec

from edge.bundle import io_spec
from edge.bundle.engine_file import ENGINE_JSON
from edge.bundle.manifest import DraftHead, Manifest, read_manifest
from edge.bundle.release import read_release
from edge.bundle.verified_files import verify_files
from edge.cli import echo_json
from edge.cli.options import bundle_argument, json_option
from edge.files import is_file
from edge.model.parts import Linear, Rope, only
from edge.model.spec import ModelSpec
from edge_make.manifest_text import (
    describe_from_source,
    describe_kv_cache,
    describe_sampling,
    describe_tensorrt,
    describe_vision,
)

from .inspect_engine import inspect_engine


@click.command()
@bundle_argument
@json_option
@click.option("--layers", is_flag=True, help="List every linear layer, or all layers of an engine.")
@click.option("--no-verify", is_flag=True, help="Do not hash the files.")
def inspect(bundle: Path, as_json: bool, layers: bool, no_verify: bool) -> None:
    """Show what BUNDLE is: dimensions, schemes, bytes by part, hashes.

    BUNDLE may also be the directory of an engine in it, BUNDLE/engines/NAME.
    """
    if is_file(bundle / ENGINE_JSON):
        inspect_engine(bundle, as_json, layers, verify=not no_verify)
        return
    manifest = read_manifest(bundle)
    if not no_verify:
        verify_files(bundle, manifest)
    if as_json:
        summary = msgspec.to_builtins(manifest)
        summary["bytes_by_part"] = bytes_by_part(manifest)
        summary["verified"] = not no_verify
        echo_json(summary)
        return
    _print_tables(bundle, manifest, layers, verified=not no_verify)


def _different(texts: Iterable[str]) -> str:
    """Join what layers differ in, each once."""
    return " or ".join(dict.fromkeys(texts))


def _turns(model: ModelSpec, table: int) -> str:
    """Describe a table of RoPE, and how many layers it turns unless it is all."""
    layers = [parts for _, parts in model.each_layer()]
    count = sum(any(part.table == table for part in only(parts, Rope)) for parts in layers)
    where = "" if count == len(layers) else f" in {count} of {len(layers)} layers"
    return f"{model.ropes[table].kind}, theta {model.ropes[table].theta:g}{where}"


def bytes_by_part(manifest: Manifest) -> dict[str, int]:
    """Count the bytes of the weights by kind of layer, of the token table, and of all files."""
    parts: Counter[str] = Counter()
    for name, linear in manifest.quantization.linears.items():
        parts[name.rsplit(".", maxsplit=1)[-1]] += linear.num_bytes
    parts["token_embeddings"] = manifest.files["embeddings.safetensors"].num_bytes
    parts["all_files"] = sum(file.num_bytes for file in manifest.files.values())
    return dict(parts)


def _print_tables(bundle: Path, manifest: Manifest, layers: bool, *, verified: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        result = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            is_number = column in ("bytes", "count")
            result.add_column(column, justify="right" if is_number else "left", overflow="fold")
        return result

    console = Console(markup=False)  # a path may hold brackets
    model = manifest.model
    facts = table(f"{manifest.name}  ({bundle})", "", "")
    facts.show_header = False
    revision = f" at {manifest.source.revision}" if manifest.source.revision else ""
    from_source = describe_from_source(manifest)
    kv_bytes = io_spec.kv_bytes_per_token(model, manifest.dtype, manifest.int8_layers)
    parts = [part for run in model.layers for part in run.parts]
    heads = _different(f"{a.heads}/{a.kv_heads} x {a.dim}" for a in model.attentions())
    intermediate = _different(f"{a.width}" for a in only(parts, Linear) if a.name == "down")
    for name, value in (
        ("source", f"{manifest.source.kind} {manifest.source.location}{revision}"),
        ("licence", manifest.source.licence or "not stated"),
        ("exported", f"{manifest.created} by {manifest.producer}"),
        *((("release", str(release)),) if (release := read_release(manifest)) else ()),
        ("architecture", f"{model.architecture}, {model.num_layers} layers"),
        (
            "dimensions",
            f"hidden {model.hidden_size}, heads {heads}, intermediate {intermediate}, "
            f"vocab {model.vocab_size}",
        ),
        ("RoPE", "; ".join(_turns(model, table) for table in range(len(model.ropes)))),
        ("dialect", f"{manifest.dialect}, {manifest.dtype}"),
        ("TensorRT", describe_tensorrt(manifest)),
        ("KV capacity", f"{manifest.kv_capacity} tokens, {kv_bytes:,} bytes each in the engine"),
        ("KV cache", describe_kv_cache(manifest)),
        (
            "quantization",
            f"{manifest.quantization.name} ({manifest.quantization.method}, clip "
            f"{manifest.quantization.clip}{_folded(manifest)})",
        ),
        *((("of the source", from_source),) if from_source is not None else ()),
        ("sampling", describe_sampling(manifest.sampling)),
        *((("EAGLE-3 head", _head(manifest.head)),) if manifest.head is not None else ()),
        *((("pictures", pictures),) if (pictures := describe_vision(manifest)) else ()),
        ("files", "all hashes match" if verified else "not verified"),
    ):
        facts.add_row(name, value)
    console.print(facts, "")

    schemes = table("Linear layers", "part", "scheme", "count", "bytes")
    groups: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for name, linear in manifest.quantization.linears.items():
        scheme = str(linear.scheme)
        if linear.float_channels:
            scheme += f", {len(linear.float_channels)} channels float"
        scheme += ", a range per token" * linear.per_token
        scheme += f", blocks of {linear.rotation_block} rotated" if linear.rotation_block else ""
        scheme += ", offsets" * linear.offsets + ", reordered" * linear.reordered
        key = (name if layers else name.rsplit(".", maxsplit=1)[-1], scheme)
        groups[key] += 1
        sizes[key] += linear.num_bytes
    for key, count in groups.items():
        schemes.add_row(*key, str(count), f"{sizes[key]:,}")
    console.print(schemes, "")

    files = table("Files", "file", "bytes", "sha256")
    for name, info in manifest.files.items():
        files.add_row(name, f"{info.num_bytes:,}", info.sha256[:16])
    console.print(files)


def _head(head: DraftHead) -> str:
    size = sum(linear.num_bytes for linear in head.linears.values())
    layers = ", ".join(map(str, head.layers))
    return (
        f"{head.name}: guesses {head.model.vocab_size:,} tokens, reads the inputs of layers "
        f"{layers}, {size:,} bytes"
    )


def _folded(manifest: Manifest) -> str:
    quantization = manifest.quantization
    folded = {"smoothed": quantization.smoothed, "rotated": quantization.rotated}
    return "".join(f", {name}" for name, is_so in folded.items() if is_so)
