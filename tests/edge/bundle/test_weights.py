"""Bytes by part against what the exporter decides and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest, TensorScheme, read_manifest
from edge.bundle.weights import manifest_linears, weight_parts
from edge_make.recipe import Recipe, find_variant, recipe_linears
from tests.conftest import Bundles
from tests.makers.manifests import make_model
from tests.makers.tiny_models import Kind


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
    linears = recipe_linears(manifest.model, Recipe(quant, group))
    positions = io_spec.rope_positions(manifest.model)
    assert weight_parts(manifest.model, linears, positions) == weight_parts(
        manifest.model, manifest_linears(manifest), manifest.rope_positions
    )


def test_w8a8_counts_the_scale_of_the_inputs():
    model = make_model(hidden_size=128, intermediate_size=256)
    linears = recipe_linears(model, find_variant("int8-w8a8"))
    as_int8 = [
        linear._replace(scheme=TensorScheme(kind="int8"))
        if linear.scheme.kind == "w8a8"
        else linear
        for linear in linears
    ]
    difference = (
        weight_parts(model, linears, 64)["scales"] - weight_parts(model, as_int8, 64)["scales"]
    )
    assert difference == 2 * 4 * model.num_layers  # all linears of a layer, in fp16
