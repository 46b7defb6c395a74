"""Graphs with own kernels: the same answers, and what cannot have them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, strategies
from numpy.testing import assert_array_equal

from edge.bundle import io_spec
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import Constant, Constants
from edge.errors import BuildError, BundleError, ResourceError
from engines import compat, own_kernels
from engines.build_plan import plan_build
from engines.compat import Compiler
from engines.config import BuildConfig
from engines.graph import graph_of
from engines.kernels.layout import unpack_weights
from engines.own_kernels import use_own_kernels
from tests.conftest import Bundles, Checkpoints, PoolingBundles
from tests.engines.own_builds import check_graph, export, rewrite
from tests.own_kernel_graphs import compute, inputs_of
from tests.tiny_models import Kind

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
    own = rewrite(bundle, tmp_path / "own")
    manifest = read_manifest(bundle)
    assert own.linears == tuple(manifest.quantization.linears)
    assert own.left == {}
    check_graph(bundle, own)
    feed = inputs_of(manifest, tokens=5, rows=16)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, io_spec.LOGITS)
    after = compute(own.data, own.path.parent, feed, io_spec.LOGITS)
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
    own = rewrite(bundle, tmp_path / "own")
    assert own.left == {}
    check_graph(bundle, own)
    feed = inputs_of(read_manifest(bundle), tokens=3, rows=8)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, io_spec.LOGITS)
    after = compute(own.data, own.path.parent, feed, io_spec.LOGITS)
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE


def test_the_graph_of_an_engine_with_other_options(tiny_bundles: Bundles, tmp_path: Path) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    config = BuildConfig(
        bundle, max_prefill=16, kv_capacity=64, kv_read="full", best_logits=8, kernels="own"
    )
    manifest = read_manifest(bundle)
    data = graph_of(plan_build(config, manifest))
    own = rewrite(bundle, tmp_path / "own", data)
    assert own.left == {}
    feed = inputs_of(manifest, tokens=3, rows=64)
    before = compute(data, bundle, feed, io_spec.BEST_VALUES)
    after = compute(own.data, own.path.parent, feed, io_spec.BEST_VALUES)
    assert after.shape == (1, 3, 8)
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE


def test_what_does_not_fit_is_left_and_named(tiny_checkpoints: Checkpoints, tmp_path: Path) -> None:
    bundle = export(
        tiny_checkpoints("qwen2"),
        tmp_path / "bundle",
        quant="int8-w8a8",
        calibration_tokens=256,
        keep=(("layers.0.o", "float"), ("layers.0.down", "int8"), ("layers.1.*", "int4-g32")),
    )
    own = rewrite(bundle, tmp_path / "own")
    assert own.left["layers.0.o"] == "its weights are floats"
    assert own.left["layers.0.qkv"] == "its inputs are rounded to INT8, and the kernels take FP16"
    wanted = ("layers.0.down", *(f"layers.1.{part}" for part in ("qkv", "o", "gate_up", "down")))
    assert own.linears == (*wanted, "lm_head")
    check_graph(bundle, own)
    feed = inputs_of(read_manifest(bundle), tokens=3, rows=8)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, io_spec.LOGITS)
    after = compute(own.data, own.path.parent, feed, io_spec.LOGITS)
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
        rewrite(bundle, tmp_path / "own")


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
        use_own_kernels((bundle / "decoder.onnx").read_bytes(), manifest, bundle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_of_one_plane_that_the_manifest_gives_two(
    tiny_bundles: Bundles, tmp_path: Path
) -> None:
    bundle = tiny_bundles("llama", "portable", "int4")
    manifest = changed(bundle, planes=True)
    own = use_own_kernels((bundle / "decoder.onnx").read_bytes(), manifest, bundle, tmp_path)
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
    own = rewrite(bundle, tmp_path / "own")
    assert own.left == {"layers.1.o": "its high plane's scales are not 16 times the low one's"}


def test_a_product_that_something_else_reads_is_left(tiny_bundles: Bundles, tmp_path: Path) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int8")
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    (low,) = (n for n in graph.nodes if "layers.0.qkv.dequantized" in n.inputs)
    (reader,) = (n for n in graph.nodes if "layers.0.gate_up.out" in n.inputs)
    reader.inputs.append(low.outputs[0])
    own = rewrite(bundle, tmp_path / "own", graph.serialize())
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
    own = rewrite(bundle, tmp_path / "own", graph.serialize())
    after = OnnxFile(own.data)
    (plugin,) = (n for n in after.nodes if n.name == "layers.0.qkv/w4_linear")
    assert plugin.outputs == ["layers.0.qkv.product"]
    assert plugin.inputs[3] == "own_kernels.no_bias"
    assert "layers.0.qkv.out" in {n.outputs[0] for n in after.nodes if n.op_type == "Add"}


def test_weights_are_packed_some_rows_at_a_time(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int8")
    whole = rewrite(bundle, tmp_path / "whole")
    monkeypatch.setattr(own_kernels, "_CHUNK", 1)
    parts = rewrite(bundle, tmp_path / "parts")
    assert parts.data == whole.data
    packed = [each.path.with_name("decoder.onnx.own").read_bytes() for each in (whole, parts)]
    assert packed[0] == packed[1]
    assert [*own_kernels._row_ranges(96, 3)] == [(0, 32), (32, 64), (64, 96)]


@given(
    blocks=strategies.integers(1, 6),
    columns=strategies.integers(1, 33),
    planes=strategies.integers(1, 2),
    chunk=strategies.integers(1, 4000),
    before=strategies.integers(0, 9000),
    seed=strategies.integers(0, 1 << 16),
)
def test_any_weights_come_through_the_file(
    blocks: int, columns: int, planes: int, chunk: int, before: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    whole = random.integers(-8, 8, (planes, blocks * 32, columns), np.int8)
    flat = whole.astype(np.uint8) & 15
    pairs = flat.reshape(planes, -1, 2)
    raw = (pairs[..., 0] | pairs[..., 1] << 4).tobytes()
    size = len(raw) // planes
    constants = tuple(
        Constant("w", "int4", whole.shape[1:], None, "f", before + place * size)
        for place in range(planes)
    )
    source, target = io.BytesIO(bytes(before) + raw), io.BytesIO()
    target.write(bytes(before))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_kernels, "_CHUNK", chunk)
        shape, (start, num_bytes) = own_kernels._write_packed(constants, source, target)
    assert start % 4096 == 0
    assert num_bytes == len(raw)
    words = np.frombuffer(target.getvalue(), np.int32, offset=start).reshape(shape)
    assert_array_equal(unpack_weights(words), whole)


def test_weights_that_end_too_early_are_told() -> None:
    constant = Constant("w", "int4", (64, 3), None, "f", 0)
    with pytest.raises(BundleError, match="the weights of w end too early"):
        own_kernels._write_packed((constant,), io.BytesIO(bytes(95)), io.BytesIO())


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_models_that_embed_or_judge(
    pooling_bundles: PoolingBundles, tmp_path: Path, task: Any
) -> None:
    bundle = pooling_bundles(task, "portable", "int4")
    manifest = read_manifest(bundle)
    own = rewrite(bundle, tmp_path / "own")
    assert own.left == ({} if task == "embed" else {"lm_head": "its weights are floats"})
    check_graph(bundle, own)
    feed = inputs_of(manifest, tokens=5, rows=16)
    output = io_spec.output_name(manifest.model)
    before = compute((bundle / "decoder.onnx").read_bytes(), bundle, feed, output)
    after = compute(own.data, own.path.parent, feed, output)
    assert np.abs(after.astype(np.float64) - before).max() < LOGITS_TOLERANCE


def test_a_full_disk_is_told_before_anything_is_written(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="1,000 are free"):
        rewrite(bundle, tmp_path / "own")
    assert not list((tmp_path / "own").iterdir())


@pytest.mark.parametrize("dialect", ["portable", "native"])
def test_nvidias_own_parser_wants_the_plugin_and_nothing_else(
    tiny_bundles: Bundles, tmp_path: Path, dialect: str
) -> None:
    """TensorRT for RTX has no plugins, but the parser of all: it reads the rest of the graph."""
    pytest.importorskip("tensorrt_rtx")
    own = rewrite(tiny_bundles("qwen2", dialect, "int8"), tmp_path / "own")
    lines: list[str] = []
    compiler = Compiler(compat.load("tensorrt-rtx"), lambda _level, text: lines.append(text))
    with pytest.raises(BuildError, match=r"w4_linear: .*Plugin not found.*\(8 more such errors\)"):
        compiler.parse(own.data, own.path, "slice")
    wanted = "pluginName: w4_linear, pluginVersion: 1, pluginNamespace: edge_llm"
    assert sum(line.startswith("Plugin not found") and wanted in line for line in lines) == 9
