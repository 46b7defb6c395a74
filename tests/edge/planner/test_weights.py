"""Bytes by part against what the exporter decides and writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest, read_manifest
from edge.errors import ConfigError
from edge.planner.models import BUILT_IN
from edge.planner.weights import (
    VARIANTS,
    Variant,
    find_variant,
    manifest_linears,
    schemes,
    variant_linears,
    weight_parts,
)
from export.quantize.recipe import Recipe, linear_layers
from tests.conftest import Bundles
from tests.manifests import make_model
from tests.tiny_models import Kind


@pytest.mark.parametrize("name", list(BUILT_IN))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_schemes_are_those_of_the_exporter(name: str, variant: Variant):
    model = BUILT_IN[name].spec
    keep: Any = (tuple(variant.keep.split("=")),) if variant.keep else ()
    expected = Recipe(variant.quant, variant.group_size, keep).schemes(model)
    found = schemes(model, variant)
    assert {
        layer.name: found[layer.name.rsplit(".", maxsplit=1)[-1]] for layer in linear_layers(model)
    } == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_the_options_are_those_of_export(variant: Variant):
    from export.cli import export

    arguments = ["source", "-o", "bundle", *variant.export_options()]
    with export.make_context("export", arguments) as context:
        assert context.params["quant"] == variant.quant
        assert context.params["group_size"] == variant.group_size


def exact_bytes(manifest: Manifest, bundle: Path) -> dict[str, int]:
    """Bytes of every external tensor, as the graph's file lists them, by the planner's parts."""
    found = dict.fromkeys(("linears", "norms", "rope"), 0)
    for name, num_bytes in _external_tensors(bundle / manifest.graphs.decoder).items():
        is_norm = name.endswith(("norm.weight", ".bias"))
        part = "rope" if name.startswith("rope.") else "norms" if is_norm else "linears"
        found[part] += num_bytes
    return found


def _external_tensors(path: Path) -> dict[str, int]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return {
        tensor.name: int({e.key: e.value for e in tensor.external_data}["length"])
        for tensor in model.graph.initializer
        if tensor.external_data
    }


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
def test_weights_of_a_bundle_are_exact(kind: Kind, quant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind, quant=quant)
    manifest = read_manifest(bundle)
    parts = weight_parts(manifest.model, manifest_linears(manifest), manifest.rope_positions)
    linears = sum(parts[part] for part in ("attention", "mlp", "lm_head", "scales"))
    assert linears == sum(info.num_bytes for info in manifest.quantization.linears.values())
    found = {"linears": linears, "norms": parts["norms"], "rope": parts["rope"]}
    assert found == exact_bytes(manifest, bundle)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
def test_a_config_gives_the_bytes_of_the_bundle_to_come(
    kind: Kind, quant: Any, tiny_bundles: Bundles
):
    manifest = read_manifest(tiny_bundles(kind, quant=quant))
    group = None if quant == "fp16" else 32
    linears = variant_linears(manifest.model, Variant("x", quant, group))
    positions = io_spec.rope_positions(manifest.model)
    assert weight_parts(manifest.model, linears, positions) == weight_parts(
        manifest.model, manifest_linears(manifest), manifest.rope_positions
    )


def test_w8a8_counts_the_scale_of_the_inputs():
    model = make_model(hidden_size=128, intermediate_size=256)
    linears = variant_linears(model, find_variant("int8-w8a8"))
    as_int8 = [
        dataclasses.replace(
            linear, scheme=msgspec.structs.replace(linear.scheme, kind="int8", group_size=0)
        )
        if linear.scheme.kind == "w8a8"
        else linear
        for linear in linears
    ]
    difference = (
        weight_parts(model, linears, 64)["scales"] - weight_parts(model, as_int8, 64)["scales"]
    )
    assert difference == 2 * 3 * model.num_layers  # qkv, o and gate_up, in fp16


def test_what_does_not_fit_is_refused():
    narrow = make_model(hidden_size=96, num_heads=4, head_dim=24)
    with pytest.raises(ConfigError, match=r"group sizes that divide.*\[32\]"):
        schemes(narrow, Variant("int4-g128", "int4", 128))
    with pytest.raises(ConfigError, match="--quant int3 is unknown"):
        find_variant("int3")
