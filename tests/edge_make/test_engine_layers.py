"""The inspector's JSON becomes a table: types, fusions, kernels, per profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge.bundle.manifest import read_manifest
from edge.errors import BundleError
from edge_make.engine_layers import LayerTable, layers_path, parse_inspector, read_layers
from tests.conftest import Bundles
from tests.standins.inspector import inspector_json

PROFILES = ("prefill", "decode")


def table(bundle: Path, **options) -> LayerTable:
    return parse_inspector([inspector_json(read_manifest(bundle), **options)], PROFILES)


@pytest.mark.parametrize("release", [(10, 3), (10, 16), (11, 4)])
def test_types_kernels_and_nodes_of_every_layer(
    tiny_bundles: Bundles, release: tuple[int, int]
) -> None:
    found = table(tiny_bundles("qwen2", quant="int4"), release=release)
    for profile in PROFILES:
        layers = found.of(profile)
        assert len(layers) == len(found.layers) / 2
        assert not any("[profile" in layer.name for layer in layers)
        down = next(layer for layer in layers if layer.name == "layers.1.down_myl0")
        assert (down.kind, down.dtype, down.tactic) == ("gemm", "int4", "gemv_w4a16_sm80")
        assert down.reads == ("fp16", "int4", "fp16")
        assert down.nodes == (
            "layers.1.down.dequantized/DequantizeLinear",
            "layers.1.down.out/MatMul",
        )
        assert not down.unpacks
        (copy,) = [layer for layer in layers if layer.reformats]
        assert copy.reads == copy.writes == ("int64",)
        assert copy.dtype == "-"


@pytest.mark.parametrize(
    ("quant", "products"),
    [
        ("fp16", {"fp16": 9}),
        ("int8", {"int8": 9}),
        ("int8-w8a8", {"int8": 9}),
    ],
)
def test_the_summary_counts_products_by_type(
    tiny_bundles: Bundles, quant: str, products: dict[str, int]
) -> None:
    prefill, decode = table(tiny_bundles("qwen2", quant=quant)).summary()
    assert (prefill.profile, decode.profile) == PROFILES
    assert prefill.products == decode.products == products
    assert prefill.attention == decode.attention == "fused"
    assert prefill.reformats == 1
    assert prefill.unpacking == 0


def test_weights_that_are_unpacked_at_run_time_are_counted(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", quant="int4")
    before = table(bundle).summary()[1]
    after = table(bundle, unpacked=("layers.0.down", "layers.1.o")).summary()[1]
    assert after.unpacking == 2
    assert after.products["fp16"] == 2
    assert after.products["int4"] == before.products["int4"] - 2


def test_attention_in_own_kernels_or_in_some(tiny_bundles: Bundles) -> None:
    manifest = read_manifest(tiny_bundles("qwen2"))
    for own, expected in (((0, 1), "own"), ((1,), "mixed")):
        names = tuple(f"layers.{layer}.attention" for layer in own)
        text = inspector_json(manifest, own=names)
        assert {each.attention for each in parse_inspector([text], PROFILES).summary()} == {
            expected
        }


def test_attention_in_one_kernel_or_in_several(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", quant="int4")
    fused, apart = table(bundle).summary()[1], table(bundle, fused=False).summary()[1]
    assert (fused.attention, apart.attention) == ("fused", "decomposed")
    assert fused.products == apart.products  # attention's own products are not linear layers
    assert apart.layers == fused.layers + 4
    half = json.loads(inspector_json(read_manifest(bundle)))
    for layer in half["Layers"]:
        if "mha" in layer["Name"] and "_1" in layer["Name"].split(" ")[0][-2:]:
            layer["Name"] = layer["TacticName"] = "attend"
    assert parse_inspector([json.dumps(half)], PROFILES).summary()[0].attention == "mixed"


def test_an_engine_without_details_says_so(tiny_bundles: Bundles) -> None:
    with pytest.raises(BundleError, match=r"without details.*LAYER_NAMES_ONLY.*edge-llm build"):
        table(tiny_bundles("qwen2"), detailed=False)
    with pytest.raises(BundleError, match="verbosity NONE"):
        parse_inspector(['{"Layers": []}'], PROFILES)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [{"Name": "x"}, 3]}']
)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="no table of layers"):
        parse_inspector([text], PROFILES)


def test_a_type_that_is_not_known_is_left_out() -> None:
    layer = {
        "Name": "x",
        "LayerType": "kgen",
        "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}, {"Format/Datatype": "Half"}],
        "Outputs": [],
        "Weights": {"Type": "Int8", "Count": 9},
    }
    (found,) = parse_inspector([json.dumps({"Layers": [layer]})], PROFILES).layers
    assert found.reads == ("fp16", "int8")
    assert found.dtype == "int8"


@pytest.mark.parametrize("marked", [True, False])
def test_a_text_per_profile_is_the_same_table(tiny_bundles: Bundles, marked: bool) -> None:
    """Of an execution context, with or without the mark of its profile in the names."""
    bundle = tiny_bundles("qwen2", quant="int4")
    manifest = read_manifest(bundle)
    texts = [inspector_json(manifest, profiles=(i,)) for i in range(2)]
    if not marked:
        texts[1] = texts[1].replace(" [profile 1]", "")
    assert parse_inspector(texts, PROFILES) == table(bundle)


def test_the_file_beside_the_plan(tiny_bundles: Bundles, tmp_path: Path) -> None:
    import msgspec

    plan, found = tmp_path / "engine-1.plan", table(tiny_bundles("qwen2"))
    assert read_layers(plan) is None
    layers_path(plan).write_bytes(msgspec.json.encode(found))
    assert read_layers(plan) == found
    layers_path(plan).write_text("{")
    with pytest.raises(BundleError, match=r"engine-1\.layers\.json is damaged"):
        read_layers(plan)
