"""``build --kernels``: own kernels in the graph, the same answers, and what cannot have them."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies
from numpy.testing import assert_array_equal

from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import io_spec
from edge.bundle.engine_file import EngineInfo, find_engines, read_engine_info, rebuild_command
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import Constant, Constants
from edge.cli.inspect import inspect
from edge.device.gpu import Gpu
from edge.errors import (
    BuildError,
    BundleError,
    ConfigError,
    DependencyError,
    IntegrityError,
    ResourceError,
)
from engines import builder, compat, own_kernels, tune
from engines.audit import audit_network
from engines.build_plan import BuildPlan, plan_build
from engines.builder import Target, build_engine, compile_bundle
from engines.cli import build
from engines.compat import Compiler, TensorRT
from engines.config import BuildConfig
from engines.graph import graph_of
from engines.kernels.layout import unpack_weights
from engines.kernels.package import Ptx
from engines.ladder import describe, make_rungs
from engines.own_kernels import OwnGraph, use_own_kernels
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import RUNNABLE, Bundles, Checkpoints, PoolingBundles
from tests.fake_cuda import FakeGpu
from tests.fake_plugin import PLUGINS
from tests.fake_tensorrt import emptied, install, make_module
from tests.own_kernel_graphs import compute, inputs_of
from tests.tiny_models import Kind, write_checkpoint

# Of a logit: each layer's product is rounded to FP16 once instead of up to four times.
LOGITS_TOLERANCE = 0.06
needs_a_runner = pytest.mark.skipif(
    RUNNABLE != "native", reason="needs ONNX Runtime >= 1.26 for dialect native"
)


def rewrite(bundle: Path, directory: Path, data: bytes | None = None) -> OwnGraph:
    directory.mkdir()
    graph = data or (bundle / "decoder.onnx").read_bytes()
    return use_own_kernels(graph, read_manifest(bundle), bundle, directory)


def export(source: Path, output: Path, **options: Any) -> Path:
    config = {"quant": "int4", "dialect": "portable", "kv_capacity": 64, **options}
    if config["quant"] == "int4":
        config.setdefault("method", "rtn")
    export_checkpoint(ExportConfig(source=str(source), output=output, **config))
    return output


def check_graph(bundle: Path, own: OwnGraph) -> None:
    """Nothing is left over of what was replaced, and the weights are as many bytes."""
    before = OnnxFile((bundle / "decoder.onnx").read_bytes())
    after = OnnxFile(own.data)
    plugins = [node for node in after.nodes if node.domain == "edge_llm"]
    assert [node.name for node in plugins] == [f"{name}/w4_linear" for name in own.linears]
    made = {name for node in after.nodes for name in node.outputs}
    read = {name for node in after.nodes for name in node.inputs}
    for name in own.linears:
        assert not {f"{name}.dequantized", f"{name}.high_dequantized"} & made
    constants = Constants(after, own.path.parent)
    assert constants.initializers <= read
    old = Constants(before, bundle)
    packed = own.path.parent / "decoder.onnx.own"
    used = stored_bytes = 0
    for node in plugins:
        weights = constants.get(node.inputs[1])
        assert weights is not None
        assert weights.location == packed.name
        assert weights.offset % 4096 == 0
        words = constants.values(weights.name)
        assert words is not None
        name = node.name.removesuffix("/w4_linear")
        for place, plane in enumerate(unpack_weights(words.reshape(weights.shape))):
            part = "high_" if place else ""
            stored = _stored(before, old, f"{name}.{part}dequantized", bundle)
            assert_array_equal(plane, stored)
            stored_bytes = stored.size // 2
            used += stored_bytes
        assert weights.num_bytes == weights.shape[1] * stored_bytes
    assert used <= packed.stat().st_size <= used + (len(plugins) + 1) * 4096
    assert (own.path.parent / "decoder.onnx.data").resolve() == bundle / "decoder.onnx.data"
    assert after.opsets["edge_llm"] == 1


def _stored(graph: OnnxFile, constants: Constants, weight: str, bundle: Path) -> Any:
    """INT4 as numbers, read in the plainest way."""
    (node,) = (each for each in graph.nodes if weight in each.outputs)
    constant = constants.get(node.inputs[0])
    assert constant is not None
    with (bundle / "decoder.onnx.data").open("rb") as file:
        file.seek(constant.offset)
        raw = file.read(constant.num_bytes)
    nibbles = [part for byte in raw for part in (byte & 15, byte >> 4)]
    signed = [nibble - 16 if nibble > 7 else nibble for nibble in nibbles]
    return np.array(signed[: constant.volume], np.int8).reshape(constant.shape)


# The graph


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
        keep=(("layers.0.o", "float"), ("layers.1.*", "int4-g32")),
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


# A build on the stand-ins


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu()
    install(monkeypatch, device)
    monkeypatch.setattr(PLUGINS, "known", {})
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", PLUGINS.module())
    device.push()  # the build reads the layers, for which TensorRT takes the primary context
    with emptied(device):
        yield device
        device.pop()


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", "native", "int4"), tmp_path / "bundle"))


@pytest.fixture
def target(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Target:
    found = target_of(gpu)
    monkeypatch.setattr(builder, "find_target", lambda **_options: found)
    return found


def target_of(gpu: FakeGpu, version: str = "10.16.2.10") -> Target:
    module = make_module(gpu, version)
    return Target(TensorRT(module, "tensorrt", version), Gpu("Orin", "8.7"), "8.7")


def run(bundle: Path, *arguments: str) -> Any:
    line = [str(bundle), "--max-prefill", "32", *arguments]
    return CliRunner().invoke(build, line, catch_exceptions=False)


def only_engine(bundle: Path) -> tuple[Path, EngineInfo]:
    (directory,) = find_engines(bundle)
    return directory, read_engine_info(directory)


@needs_a_runner
def test_an_engine_with_own_kernels_stands_beside_the_other(bundle: Path, target: Target) -> None:
    assert "own kernels" not in run(bundle).stdout
    (bundle / "engines" / ".kernels-of-a-killed-build").mkdir()
    text = run(bundle, "--kernels", "own").stdout
    assert "own kernels: 9 layers\n" in text
    assert "left to TensorRT" not in text
    plain, own = find_engines(bundle)[::-1] if "own" in find_engines(bundle)[0].name else (
        find_engines(bundle)
    )  # fmt: skip
    assert own.name == f"{plain.name}-own-kernels"
    infos = read_engine_info(plain), read_engine_info(own)
    assert [info.kernels for info in infos] == ["tensorrt", "own"]
    assert [info.plugins for info in infos] == [None, "compiled"]
    assert infos[1].python_kernels == ()
    assert infos[0].key != infos[1].key
    assert infos[1].own_linears == tuple(read_manifest(bundle).quantization.linears)
    assert infos[1].weights == infos[0].weights
    layers = {each.kind: each.count for each in infos[1].layers}
    assert layers["plugin_v3"] == 9
    assert "dequantize" not in layers
    assert rebuild_command(own, infos[1]).endswith("--kernels own")
    assert "--kernels" not in rebuild_command(plain, infos[0])
    assert not list((bundle / "engines").glob(".kernels-*"))
    shown = CliRunner().invoke(inspect, [str(own)], catch_exceptions=False).stdout
    assert "own kernels" in shown
    assert "9 linear layers" in shown
    assert "weights as exported yes" in " ".join(shown.split())
    assert "own kernels" not in CliRunner().invoke(inspect, [str(plain)]).stdout
    compiled = {each.profile: each.products for each in infos[1].compiled}
    assert compiled["decode"]["int4"] == 9
    again = json.loads(run(bundle, "--kernels", "own", "--json").stdout)
    assert (again["built"], again["kernels"], len(again["own_linears"])) == (False, "own", 9)


@needs_a_runner
def test_it_answers_as_the_graph_on_the_cpu(bundle: Path, target: Target) -> None:
    build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)
    config = BuildConfig(bundle, max_prefill=32, kernels="own")
    rung = plan_build(config, read_manifest(bundle))
    directory, info = only_engine(bundle)
    seconds, problem = tune.measure(rung, directory)
    assert problem is None
    assert (seconds or 0) > 0
    engine = TensorRTBackend(bundle, read_manifest(bundle))
    assert engine.info == info
    engine.close()


@needs_a_runner
def test_tuning_builds_both_and_keeps_the_faster(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"own": 0.002, "tensorrt": 0.003}
    wrong: set[str] = set()
    measure = tune.measure

    def planted(rung: BuildPlan, directory: Path, progress: Any) -> Any:
        _, problem = measure(rung, directory, progress)
        assert problem is None
        if rung.kernels in wrong:
            return None, "least cosine 0.31"
        return seconds[rung.kernels], None

    monkeypatch.setattr(tune, "measure", planted)
    result = json.loads(run(bundle, "--kernels", "auto", "--tune", "--json").stdout)
    assert result["kernels"] == "own"
    directory, info = only_engine(bundle)
    assert directory.name.endswith("-auto-kernels")
    assert [(each.kernels, each.attention) for each in info.tuned] == [
        ("tensorrt", "fused"),
        ("tensorrt", "decomposed"),
        ("own", "fused"),
        ("own", "decomposed"),
    ]
    assert rebuild_command(directory, info).endswith("--kernels auto")
    assert info.tuned[2].label == "slice, fused, own kernels"
    shutil.rmtree(directory)
    wrong.add("own")
    text = run(bundle, "--kernels", "auto", "--tune").stdout
    assert "tried: attention fused, cache read as slice, own kernels: least cosine 0.31" in text
    assert only_engine(bundle)[1].kernels == "tensorrt"


@needs_a_runner
def test_tuning_goes_on_where_own_kernels_cannot_be_built(
    tiny_bundles: Bundles,
    tmp_path: Path,
    target: Target,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "measure", lambda *_: (0.001, None))
    bundle = Path(shutil.copytree(tiny_bundles("qwen2", "portable", "int4"), tmp_path / "a"))
    old = dataclasses.replace(target_of(gpu), compute_capability="7.5")
    monkeypatch.setattr(builder, "find_target", lambda **_: old)
    text = run(bundle, "--kernels", "auto", "--tune").stdout
    assert "own kernels: own kernels need a GPU of compute capability 8.0" in text
    info = only_engine(bundle)[1]
    assert (info.kernels, {each.kernels for each in info.refused}) == ("tensorrt", {"own"})
    floats = Path(shutil.copytree(tiny_bundles("qwen2", "portable"), tmp_path / "b"))
    monkeypatch.setattr(builder, "find_target", lambda **_: target)
    text = run(floats, "--kernels", "auto", "--tune").stdout
    assert "own kernels: own kernels compute no layer" in text


def test_asked_for_by_name_they_are_not_left_out(
    bundle: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="own", tune=True)
    rung = plan_build(config, read_manifest(bundle))
    old = target_of(gpu, "10.2.0.19")
    monkeypatch.setattr(compat, "check_support", lambda *_: None)
    with pytest.raises(DependencyError, match=r"TensorRT >= 10\.3"):
        tune.compile_fastest(rung, old)
    with pytest.raises(DependencyError, match=r"TensorRT >= 10\.3"):
        build_engine(dataclasses.replace(config, tune=False), target=old)


def test_without_the_plugin_the_parser_refuses(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "register_own_kernels", lambda _: 0)
    with pytest.raises(BuildError, match="Plugin not found"):
        build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)
    assert not list((bundle / "engines").glob(".kernels-*"))


def test_a_tensorrt_without_its_module_of_plugins(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(DependencyError, match=r"tensorrt\.plugin, which does not import here"):
        build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)


@needs_a_runner
def test_damaged_kernels_are_no_reason_to_go_on(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> dict[str, Ptx]:
        raise IntegrityError("the kernel is damaged")

    monkeypatch.setattr(compat, "load_ptx", damaged)
    with pytest.raises(IntegrityError):
        run(bundle, "--kernels", "auto", "--tune")


@pytest.fixture
def wide(tmp_path: Path) -> Callable[[str], Path]:
    """Exports a bundle whose heads have 64 values, which own attention takes."""

    def make(dialect: str) -> Path:
        source = write_checkpoint(tmp_path / "wide-source", "qwen3", head_dim=64)
        return export(source, tmp_path / "wide", dialect=dialect, kv_capacity=128)

    return make


@needs_a_runner
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_an_engine_with_own_attention(
    wide: Callable[[str], Path], target: Target, dialect: str
) -> None:
    bundle = wide(dialect)
    text = run(bundle, "--kernels", "own").stdout
    assert "own kernels: 9 layers, 2 attentions\n" in text
    assert "refused" not in text
    directory, info = only_engine(bundle)
    assert info.attention == "own"
    assert info.own_attentions == ("layers.0.attention", "layers.1.attention")
    kinds = [each.kind for each in info.layers for _ in range(each.count)]
    assert kinds.count("plugin_v3") == 9 + 2 + 2
    assert "softmax" not in kinds
    assert "attention_output" not in kinds
    assert {each.attention for each in info.compiled} == {"own"}
    assert info.buckets_read == ()
    partly = msgspec.structs.replace(info, left_linears={"layers.1.attention": "its cache is INT8"})
    assert partly.buckets_read == info.kv_buckets
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "9 linear layers, 2 attentions" in shown
    rung = plan_build(
        BuildConfig(bundle, max_prefill=32, kernels="own", attention="own"), read_manifest(bundle)
    )
    seconds, problem = tune.measure(rung, directory)
    assert problem is None
    assert (seconds or 0) > 0


@needs_a_runner
def test_tuning_measures_own_kernels_with_and_without_attention(
    wide: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"own": 0.002, "fused": 0.003, "decomposed": 0.004}
    monkeypatch.setattr(tune, "measure", lambda rung, *_: (seconds[rung.attention], None))
    bundle = wide("native")
    run(bundle, "--kernels", "auto", "--tune")
    info = only_engine(bundle)[1]
    assert [(each.kernels, each.attention) for each in info.tuned] == [
        *(("tensorrt", each) for each in ("fused", "decomposed")),
        *(("own", each) for each in ("own", "fused", "decomposed")),
    ]
    assert (info.kernels, info.attention) == ("own", "own")


@needs_a_runner
def test_attention_that_tensorrt_keeps(wide: Callable[[str], Path], target: Target) -> None:
    bundle = wide("native")
    run(bundle, "--kernels", "own", "--attention", "fused")
    info = only_engine(bundle)[1]
    assert (info.kernels, info.attention, info.own_attentions) == ("own", "fused", ())


def test_own_attention_goes_with_own_kernels(bundle: Path) -> None:
    choices: tuple[Any, ...] = ("tensorrt", "auto")
    for kernels in choices:
        with pytest.raises(ConfigError, match="add --kernels own"):
            BuildConfig(bundle, attention="own", kernels=kernels, tune=True)


# The audit


def test_the_audit_holds_for_attention_in_plugins(
    wide: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = wide("native")
    manifest = read_manifest(bundle)
    config = BuildConfig(bundle, max_prefill=32, kernels="own", attention="own")
    seen: list[Any] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return audit_network(*arguments)

    monkeypatch.setattr(builder, "audit_network", spy)
    assert compile_bundle(plan_build(config, manifest), target).audit.problems == ()
    ((network, _, shapes, kv_read, linears, attentions, _),) = seen

    def problems(changed: dict[str, Any], names: tuple[str, ...] = attentions) -> list[str]:
        layers = tuple(changed.get(each.name, each) for each in network.layers)
        kept = dataclasses.replace(network, layers=tuple(each for each in layers if each))
        return list(audit_network(kept, manifest, shapes, kv_read, linears, names).problems)

    found = problems({}, attentions[:1])
    assert "layers.1.attention: a plugin that nobody asked for" in found
    assert "there are 0 attentions, not 1" in found
    assert "layers.0.attention: no two plugins" in problems(
        {"layers.0.attention/attention_parts": None}
    )
    layers = {each.name: each for each in network.layers}
    first, second = (layers[f"layers.{i}.attention/attention_parts"] for i in range(2))
    swapped = dataclasses.replace(
        first, inputs=(first.inputs[0], *second.inputs[1:3], *first.inputs[3:])
    )
    (problem,) = problems({first.name: swapped})
    assert problem.startswith("layers.0.attention: the plugin reads ['present.1.key', 'present.1.v")
    cast = layers["own_attention.positions/Cast"]
    nothing = dataclasses.replace(cast, inputs=())
    assert problems({cast.name: nothing}) == [
        f"layers.{i}.attention: the plugin does not know position_ids" for i in range(2)
    ]


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_the_audit_holds_for_plugins(
    tiny_bundles: Bundles, target: Target, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    bundle = tiny_bundles("qwen3", "native", quant)
    manifest = read_manifest(bundle)
    build = plan_build(BuildConfig(bundle, max_prefill=32, kernels="own"), manifest)
    seen: list[Any] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return audit_network(*arguments)

    monkeypatch.setattr(builder, "audit_network", spy)
    monkeypatch.setattr(builder, "ENGINES_DIR", "../own-engines")  # the bundle is shared
    compiled = compile_bundle(build, target)
    assert compiled.audit.problems == ()
    ((network, _, shapes, kv_read, own, attentions, _),) = seen
    assert attentions == ()
    assert own == tuple(manifest.quantization.linears)
    problems = audit_network(network, manifest, shapes, kv_read, ()).problems
    assert f"{own[0]}: a plugin that nobody asked for" in problems
    assert f"{own[0]}: no matrix product with stored weights" in problems
    first, *more = (layer for layer in network.layers if layer.kind == "plugin_v3")
    without = dataclasses.replace(
        network, layers=tuple(each for each in network.layers if each is not first)
    )
    assert (
        f"{own[0]}: no plugin with stored weights"
        in audit_network(without, manifest, shapes, kv_read, own).problems
    )
    weights = first.inputs[1]
    assert weights is not None
    other = dataclasses.replace(weights, shape=(1, *weights.shape[1:]))
    spoiled = [
        dataclasses.replace(each, outputs=(other,)) if weights in each.outputs else each
        for each in network.layers
    ]
    spoiled = [
        dataclasses.replace(each, inputs=(each.inputs[0], other, *each.inputs[2:]))
        if each is first
        else each
        for each in spoiled
    ]
    (problem,) = audit_network(
        dataclasses.replace(network, layers=tuple(spoiled)), manifest, shapes, kv_read, own
    ).problems
    assert problem.startswith(f"{own[0]}: the plugin's weights are int32 [1, ")
    assert len(more) == len(own) - 1


# Options and refusals


def test_auto_goes_with_tune_alone(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kernels auto keeps the faster kernels.*--tune"):
        BuildConfig(bundle, kernels="auto")
    with pytest.raises(ConfigError, match="none of auto, own, tensorrt"):
        BuildConfig(bundle, kernels="mine")  # type: ignore[arg-type]
    assert BuildConfig(bundle).kernels == "tensorrt"


def test_trtexec_loads_no_plugin_of_python(bundle: Path, target: Target) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="own")
    with pytest.raises(ConfigError, match="--kernels own needs the Python API"):
        build_engine(config, via="trtexec", target=target)
    for kernels in (("own",), ("auto", "--tune")):
        with pytest.raises(ConfigError, match=rf"--kernels {kernels[0]} needs the Python API"):
            run(bundle, "--print-trtexec", "--trt", "10.16", "--kernels", *kernels)


@pytest.mark.parametrize(
    ("flavour", "version", "compute_capability", "reason"),
    [
        ("tensorrt-rtx", "1.7.0", "8.6", "TensorRT for RTX 1.7.0 has none; build with --kernels"),
        ("tensorrt", "10.2.0.19", "8.7", r"TensorRT >= 10\.3.*found 10.2.0.19.*JetPack 6.1"),
        ("tensorrt", "10.16.2", "7.5", "compute capability 8.0 or newer, this one has 7.5"),
    ],
)
def test_a_machine_without_own_kernels(
    flavour: Any, version: str, compute_capability: str, reason: str
) -> None:
    with pytest.raises(DependencyError, match=reason):
        compat.check_own_kernels(flavour, version, compute_capability)


def test_a_machine_with_own_kernels() -> None:
    for compute_capability in ("8.0", "8.7", "11.0", "12.1"):
        compat.check_own_kernels("tensorrt", "10.3.0", compute_capability)
        compat.check_own_kernels("tensorrt", "10.13.3", compute_capability)
        compat.check_own_kernels("tensorrt", "11.4.0", compute_capability)


def test_the_rungs_of_auto(bundle: Path, gpu: FakeGpu) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="auto", tune=True, attention="fused")
    rungs = make_rungs(plan_build(config, read_manifest(bundle)), target_of(gpu).rt)
    assert [rung.kernels for rung in rungs] == ["tensorrt", "own"]
    assert describe(rungs[1]) == "attention fused, cache read as slice, own kernels"


def test_an_engine_json_of_before_reads(bundle: Path, target: Target) -> None:
    build_engine(BuildConfig(bundle, max_prefill=32), target=target)
    directory, info = only_engine(bundle)
    record = json.loads((directory / "engine.json").read_text())
    for name in ("kernels", "own_linears", "left_linears"):
        record.pop(name)
    (directory / "engine.json").write_text(json.dumps(record))
    assert read_engine_info(directory) == info
