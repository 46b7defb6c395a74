"""Graphs with own kernels: the same answers, and what cannot have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle import io_spec
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import Constants
from edge.errors import BuildError
from engines.build_plan import plan_build
from engines.compiler import compat
from engines.compiler.compat import Compiler
from engines.config import BuildConfig
from engines.graph.adapt import graph_of
from engines.graph.own_kernels import use_own_kernels
from tests.conftest import Bundles, Checkpoints, PoolingBundles
from tests.engines.own_builds import check_graph, export, rewrite, weights_of
from tests.makers.tiny_models import Kind
from tests.standins.own_kernels import compute, inputs_of

# Of a logit: each layer's product is rounded to FP16 once instead of up to four times.
LOGITS_TOLERANCE = 0.06


@pytest.mark.parametrize("dialect", ["portable", "native"])
@pytest.mark.parametrize(
    ("kind", "quant"),
    [("qwen2", "int4"), ("qwen2", "int8"), ("llama", "int4"), ("qwen3", "int8"), ("qwen3", "int4")],
)
def test_the_answers_are_those_of_the_graph_as_exported(
    tiny_bundles: Bundles, tmp_path: Path, kind: Kind, quant: str, dialect: str
) -> None:
    bundle = tiny_bundles(kind, dialect, quant)
    own = rewrite(bundle)
    manifest = read_manifest(bundle)
    assert own.linears == tuple(manifest.quantization.linears)
    assert own.left == {}
    check_graph(bundle, own)
    feed = inputs_of(manifest, tokens=5, rows=16)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, io_spec.LOGITS)
    after = compute(own.data, own.path.parent, {**feed, **weights_of(own)}, io_spec.LOGITS)
    assert after.dtype == before.dtype == np.float16
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE
    assert np.abs(before).max() > 1


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 64},
        {"quant": "int8", "group_size": 64},
        {"keep": (("lm_head", "int4-g64"),)},
        {"keep": (("*.down", "int8"),)},
    ],
)
def test_recipes_of_other_groups_and_heads(
    tiny_checkpoints: Checkpoints, tmp_path: Path, options: dict[str, Any]
) -> None:
    bundle = export(tiny_checkpoints("qwen2"), tmp_path / "bundle", **options)
    own = rewrite(bundle)
    assert own.left == {}
    check_graph(bundle, own)
    feed = inputs_of(read_manifest(bundle), tokens=3, rows=8)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, io_spec.LOGITS)
    after = compute(own.data, own.path.parent, {**feed, **weights_of(own)}, io_spec.LOGITS)
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE


def test_the_graph_of_an_engine_with_other_options(tiny_bundles: Bundles, tmp_path: Path) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    config = BuildConfig(
        bundle, max_prefill=16, kv_capacity=64, kv_read="full", best_logits=8, kernels="own"
    )
    manifest = read_manifest(bundle)
    data = graph_of(plan_build(config, manifest))
    own = rewrite(bundle, data)
    assert own.left == {}
    feed = inputs_of(manifest, tokens=3, rows=64)
    before = compute(data, bundle, feed, io_spec.BEST_VALUES)
    after = compute(own.data, own.path.parent, {**feed, **weights_of(own)}, io_spec.BEST_VALUES)
    assert after.shape == (1, 3, 8)
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE


def test_unsupported_layers_are_left_and_named(
    tiny_checkpoints: Checkpoints, tmp_path: Path
) -> None:
    bundle = export(
        tiny_checkpoints("qwen2"),
        tmp_path / "bundle",
        quant="int8-w8a8",
        calibration_tokens=256,
        keep=(("layers.0.o", "float"), ("layers.0.down", "int8"), ("layers.1.*", "int4-g32")),
    )
    own = rewrite(bundle)
    assert own.left["layers.0.o"] == "its weights are floats"
    assert own.left["layers.0.qkv"] == "its inputs are rounded to INT8, and the kernels take FP16"
    wanted = ("layers.0.down", *(f"layers.1.{part}" for part in ("qkv", "o", "gate_up", "down")))
    assert own.linears == (*wanted, "lm_head")
    check_graph(bundle, own)
    feed = inputs_of(read_manifest(bundle), tokens=3, rows=8)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, io_spec.LOGITS)
    after = compute(own.data, own.path.parent, {**feed, **weights_of(own)}, io_spec.LOGITS)
    # An input that is rounded to INT8 may fall to the other side.
    assert np.abs(after.astype(np.float64) - before).max() < 0.3


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ("fp16", "its weights are floats"),
        ("bf16", "its weights are floats"),
    ],
)
def test_nothing_that_fits_is_an_error(
    tiny_bundles: Bundles, tmp_path: Path, quant: str, reason: str
) -> None:
    bundle = tiny_bundles("qwen2", "portable", quant)
    with pytest.raises(BuildError, match=f"compute no layer of .*{reason}.*without --kernels own"):
        rewrite(bundle)


def changed(bundle: Path, **fields: Any) -> Any:
    """A manifest that says something else of all linear layers' schemes, or of itself."""
    manifest = read_manifest(bundle)
    whole = {name: fields.pop(name) for name in ("dtype",) if name in fields}
    linears = {
        name: msgspec.structs.replace(each, scheme=msgspec.structs.replace(each.scheme, **fields))
        for name, each in manifest.quantization.linears.items()
    }
    quantization = msgspec.structs.replace(manifest.quantization, linears=linears)
    return msgspec.structs.replace(manifest, quantization=quantization, **whole)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "bf16"}, "its floats are bf16"),
        ({"group_size": 16}, "it has groups of 16, and the kernels take groups of 32, 64, 128"),
        ({"group_size": 0}, "it has a scale per channel"),
        ({"group_size": 64}, "are not those of this edge-llm's export"),
    ],
)
def test_a_scheme_that_the_kernels_do_not_take(
    tiny_bundles: Bundles, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    bundle = tiny_bundles("llama", "portable", "int4")
    manifest = changed(bundle, **fields)
    with pytest.raises(BuildError, match=reason):
        use_own_kernels((bundle / "decoder.onnx").read_bytes(), manifest, bundle)


def test_layers_with_fewer_planes_than_the_manifest_says_are_left(
    tiny_bundles: Bundles, tmp_path: Path
) -> None:
    bundle = tiny_bundles("llama", "portable", "int4")
    manifest = changed(bundle, planes=True)
    own = use_own_kernels((bundle / "decoder.onnx").read_bytes(), manifest, bundle)
    assert own.linears == ("lm_head",)
    assert "are not those of this edge-llm's export" in own.left["layers.0.qkv"]


def test_planes_whose_scales_are_no_multiple_are_left(
    tiny_bundles: Bundles, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundles("llama", "portable", "int8"), tmp_path / "bundle"))
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    (node,) = (n for n in graph.nodes if "layers.1.o.high_dequantized" in n.outputs)
    scale = Constants(graph).get(node.inputs[1])
    assert scale is not None
    with (bundle / "decoder.onnx.data").open("r+b") as file:
        file.seek(scale.offset)
        file.write(np.float16(3.5).tobytes())
    own = rewrite(bundle)
    assert own.left == {"layers.1.o": "its high plane's scales are not 16 times the low one's"}


def test_a_product_that_something_else_reads_is_left(tiny_bundles: Bundles, tmp_path: Path) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int8")
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    (low,) = (n for n in graph.nodes if "layers.0.qkv.dequantized" in n.inputs)
    (reader,) = (n for n in graph.nodes if "layers.0.gate_up.out" in n.inputs)
    reader.inputs.append(low.outputs[0])
    own = rewrite(bundle, graph.serialize())
    assert set(own.left) == {"layers.0.qkv"}
    assert "layers.0.qkv" in own.left["layers.0.qkv"]


def test_a_bias_that_something_else_needs_stays_a_sum_of_its_own(
    tiny_bundles: Bundles, tmp_path: Path
) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    (product,) = (n for n in graph.nodes if "layers.0.qkv.dequantized" in n.inputs)
    (reader,) = (n for n in graph.nodes if "layers.0.gate_up.out" in n.inputs)
    reader.inputs.append(product.outputs[0])
    own = rewrite(bundle, graph.serialize())
    after = OnnxFile(own.data)
    (plugin,) = (n for n in after.nodes if n.name == "layers.0.qkv/w4_linear")
    assert plugin.outputs == ["layers.0.qkv.product"]
    assert plugin.inputs[3] == "own_kernels.no_bias"
    assert "layers.0.qkv.out" in {n.outputs[0] for n in after.nodes if n.op_type == "Add"}


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_models_that_embed_or_judge(
    pooling_bundles: PoolingBundles, tmp_path: Path, task: Any
) -> None:
    bundle = pooling_bundles(task, "portable", "int4")
    manifest = read_manifest(bundle)
    own = rewrite(bundle)
    assert own.left == ({} if task == "embed" else {"lm_head": "its weights are floats"})
    check_graph(bundle, own)
    feed = inputs_of(manifest, tokens=5, rows=16)
    output = io_spec.output_name(manifest.model)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, output)
    after = compute(own.data, own.path.parent, {**feed, **weights_of(own)}, output)
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("dialect", ["portable", "native"])
def test_nvidias_own_parser_wants_the_plugin_and_nothing_else(
    tiny_bundles: Bundles, tmp_path: Path, dialect: str
) -> None:
    """TensorRT for RTX has no plugins, but the parser of all: it reads the rest of the graph."""
    pytest.importorskip("tensorrt_rtx")
    own = rewrite(tiny_bundles("qwen2", dialect, "int8"))
    lines: list[str] = []
    compiler = Compiler(compat.load("tensorrt-rtx"), lambda _level, text: lines.append(text))
    with pytest.raises(BuildError, match=r"w4_linear: .*Plugin not found.*\(8 more such errors\)"):
        compiler.parse(own.data, own.path, "slice")
    wanted = "pluginName: w4_linear, pluginVersion: 1, pluginNamespace: edge_llm"
    assert sum(line.startswith("Plugin not found") and wanted in line for line in lines) == 9
