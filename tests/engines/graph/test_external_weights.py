"""Weights outside the engine: their file, who shares it, what loads it, and what is left inside."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies
from numpy.testing import assert_array_equal

from edge.backends.tensorrt import external_weights as outside_weights
from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import io_spec
from edge.bundle.engine_file import decode_engine_info, find_engines, read_engine_info
from edge.bundle.linears import linear_layers, norm_layers
from edge.bundle.manifest import FileInfo, LinearInfo, Manifest, TensorScheme, read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import Constant, Constants
from edge.errors import BackendError, BundleError, IntegrityError, ResourceError
from edge.model.spec import ModelSpec
from edge_lab.cli.inspect import inspect
from edge_lab.planner.models import BUILT_IN
from edge_make.engine_record import verify_plan
from edge_make.progress import silent
from engines.build_plan import plan_build
from engines.builder.build import build_engine
from engines.builder.memory import check_memory
from engines.builder.target import Target
from engines.compiler import compat
from engines.compiler.compat import Compiler
from engines.config import BuildConfig
from engines.graph import external_weights as outside
from engines.graph import own_kernels
from engines.graph.adapt import graph_of
from engines.graph.external_weights import constants_inside, lay_out, make_inputs
from engines.graph.own_kernels import use_own_kernels
from engines.kernels.layout import unpack_weights
from export.graph.data_file import StoredTensor
from export.graph.decoder import DecoderTensors, build_decoder
from export.graph.linear_nodes import StoredLinear
from tests.conftest import Bundles
from tests.engines.own_builds import (
    gpu,
    needs_a_runner,
    only_engine,
    rewrite,
    run,
    target,
    weights_of,
)
from tests.makers.manifests import change_model
from tests.standins.cuda import FakeGpu

__all__ = ["gpu", "target"]  # fixtures


@pytest.fixture
def built(bundle: Path, target: Target) -> Path:
    """The directory of an engine with own kernels."""
    return build_engine(config(bundle), target=target).directory


def config(bundle: Path, **options: Any) -> BuildConfig:
    return BuildConfig(bundle, max_prefill=32, kernels="own", **options)


# The file


@given(
    blocks=strategies.integers(1, 6),
    columns=strategies.integers(1, 33),
    planes=strategies.integers(1, 2),
    chunk=strategies.integers(1, 4000),
    before=strategies.integers(0, 9000),
    seed=strategies.integers(0, 1 << 16),
)
def test_any_weights_come_through_the_file(
    blocks: int,
    columns: int,
    planes: int,
    chunk: int,
    before: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    random = np.random.default_rng(seed)
    whole = random.integers(-8, 8, (planes, blocks * 32, columns), np.int8)
    scales = random.standard_normal((blocks, columns)).astype(np.float16)
    pairs = (whole.astype(np.uint8) & 15).reshape(planes, -1, 2)
    raw = (pairs[..., 0] | pairs[..., 1] << 4).tobytes()
    size = len(raw) // planes
    directory = tmp_path_factory.getbasetemp()
    (directory / "f").write_bytes(bytes(before) + raw + scales.tobytes())
    constants = [
        Constant("w", "int4", whole.shape[1:], None, "f", before + place * size)
        for place in range(planes)
    ]
    laid = lay_out(
        directory,
        {
            "none": (Constant("none", "fp16", (1,), bytes(2)),),
            "words": tuple(constants),
            "scales": (Constant("s", "fp16", scales.shape, None, "f", before + len(raw)),),
        },
    )
    target = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "_CHUNK", chunk)
        sha256 = laid.write(target)
    data, places = target.getvalue(), laid.tensors
    assert (laid.num_bytes, sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [each.offset % 256 for each in places.values()] == [0, 0, 0]
    words, found = places["words"], places["scales"]
    assert (words.dtype, words.shape) == ("int32", (blocks, planes, columns, 4))
    packed = np.frombuffer(data[words.offset : words.end], np.int32).reshape(words.shape)
    assert_array_equal(unpack_weights(packed), whole)
    assert data[found.offset : found.end] == scales.tobytes()


def test_no_piece_is_larger_than_a_chunk(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = rewrite(tiny_bundles("qwen2", "portable", "int8"))
    assert own.outside is not None
    pieces: list[int] = []

    class Target(io.BytesIO):
        def write(self, piece: Any) -> int:
            pieces.append(memoryview(piece).nbytes)
            return super().write(piece)

    whole, most = own.outside.write(Target()), max(pieces)
    monkeypatch.setattr(outside, "_CHUNK", 1)
    pieces.clear()
    assert own.outside.write(Target()) == whole
    widest = max(each.shape[-2] for each in own.outside.tensors.values() if len(each.shape) == 4)
    assert max(pieces) == 32 * widest < most  # a block of rows: two planes, half a byte each


def test_truncated_weights_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(95))
    laid = lay_out(tmp_path, {"words": (Constant("w", "int4", (64, 3), None, "f", 0),)})
    with pytest.raises(BundleError, match="the weights of w end too early"):
        laid.write(io.BytesIO())


def test_weights_that_tensorrt_also_reads_stay_in_the_plan(tiny_bundles: Bundles) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    before = rewrite(bundle)
    assert before.outside is not None
    assert "layers.0.qkv.bias" in before.outside.tensors
    (scale,) = (n.inputs[1] for n in graph.nodes if "layers.0.o.dequantized" in n.outputs)
    (reader,) = (n for n in graph.nodes if "layers.0.gate_up.out" in n.inputs)
    reader.inputs.append(scale)
    own = use_own_kernels(graph.serialize(), read_manifest(bundle), bundle)
    assert own.outside is not None
    assert before.outside.tensors.keys() - own.outside.tensors.keys() >= {scale}
    assert scale in constants_inside(own.data)


@pytest.mark.parametrize(("dialect", "moved"), [("portable", True), ("native", False)])
def test_large_lookup_tables_become_inputs_too(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch, dialect: str, moved: bool
) -> None:
    """In ``native`` TensorRT's own operator reads them, which nobody has seen take an input."""
    bundle = tiny_bundles("llama", dialect, "int4")
    small = rewrite(bundle)
    monkeypatch.setattr(own_kernels, "LARGE_BYTES", 256)
    large = rewrite(bundle)
    assert small.outside is not None
    assert large.outside is not None
    tables = large.outside.tensors.keys() - small.outside.tensors.keys()
    assert len(tables) == (2 if moved else 0)
    assert all("rope" in name for name in tables)


# The engine


def test_an_engines_weights_are_in_a_file_beside_it(bundle: Path, built: Path) -> None:
    info, manifest = read_engine_info(built), read_manifest(bundle)
    assert info.outside is not None
    data = (built / info.outside.file).read_bytes()
    assert hashlib.sha256(data).hexdigest() == info.outside.sha256
    assert info.outside.file == f"engine-{info.outside.sha256[:12]}.weights"
    assert info.weights_bytes == info.plan_bytes + len(data)
    assert plan_engine_memory(info, manifest).weights_bytes == info.weights_bytes
    own = rewrite(bundle)
    expected = weights_of(own)
    assert own.outside is not None
    assert info.outside.tensors == own.outside.tensors
    for name, each in info.outside.tensors.items():
        assert data[each.offset : each.end] == expected[name].tobytes()
    shown = CliRunner().invoke(inspect, [str(built)], catch_exceptions=False).stdout
    words = f"{info.outside.file}, {len(data):,} bytes, {len(expected)} tensors"
    assert words in " ".join(shown.split())
    verify_plan(built, info)


def test_the_build_says_both_sizes(bundle: Path, target: Target) -> None:
    text = run(bundle, "--kernels", "own").stdout
    assert " MB of weights in " in text


@needs_a_runner
@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_the_file_is_uploaded_whole_in_any_piece_size(
    bundle: Path, built: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(outside_weights, "_PIECES_BYTES", size)
    info = read_engine_info(built)
    assert info.outside is not None
    engine = TensorRTBackend(bundle, read_manifest(bundle))
    addresses = engine._engine.weights
    start = addresses["own_kernels.no_bias"] - info.outside.tensors["own_kernels.no_bias"].offset
    data = (built / info.outside.file).read_bytes()
    assert bytes(gpu.memory(start, len(data))) == data
    assert addresses.keys() == info.outside.tensors.keys()
    assert all(address % 256 == 0 for address in addresses.values())
    engine.close()


@needs_a_runner
@pytest.mark.parametrize("damage", ["flipped", "short", "long", "gone"])
def test_a_changed_weights_file_is_refused_and_rebuilt(
    bundle: Path, built: Path, target: Target, damage: str
) -> None:
    info = read_engine_info(built)
    assert info.outside is not None
    path = built / info.outside.file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= damage == "flipped"
        path.write_bytes({"short": data[:-1], "long": data + b"0"}.get(damage, data))
    with pytest.raises(IntegrityError, match=r"\.weights.*build it again with: edge-llm build"):
        TensorRTBackend(bundle, read_manifest(bundle))
    with pytest.raises(IntegrityError):
        verify_plan(built, info)
    again = build_engine(config(bundle), target=target)
    assert again.built
    assert again.info.outside == info.outside
    TensorRTBackend(bundle, read_manifest(bundle)).close()


def test_engines_of_a_bundle_share_the_file(bundle: Path, built: Path, target: Target) -> None:
    second = build_engine(config(bundle, max_batch=2), target=target)
    first = read_engine_info(built)
    assert first.outside is not None
    assert second.info.outside == first.outside
    assert second.directory != built
    files = [directory / first.outside.file for directory in (built, second.directory)]
    assert files[0].samefile(files[1])
    third = build_engine(config(bundle, max_batch=2, again=True), target=target)
    assert files[0].samefile(third.directory / first.outside.file)
    assert [path.name for path in third.directory.glob("*.weights")] == [first.outside.file]


def test_weights_are_not_shared_with_untrusted_or_damaged_engines(
    bundle: Path, built: Path, target: Target
) -> None:
    info = read_engine_info(built)
    assert info.outside is not None
    stranger = built.with_name("stranger")
    shutil.copytree(built, stranger)
    shutil.rmtree(built)
    (stranger / "engine.json").write_bytes(  # of which this machine has no record
        msgspec.json.encode(msgspec.structs.replace(info, build_s=3.0))
    )
    second = build_engine(config(bundle), target=target)
    assert second.info.outside == info.outside
    weights = second.directory / info.outside.file
    assert not weights.samefile(stranger / info.outside.file)
    shutil.rmtree(stranger)
    weights.write_bytes(bytes(info.outside.num_bytes))
    third = build_engine(config(bundle, max_batch=2), target=target)
    verify_plan(third.directory, third.info)
    assert not weights.samefile(third.directory / info.outside.file)


def test_leftovers_of_a_killed_build_are_not_used_as_weights(
    bundle: Path, built: Path, target: Target
) -> None:
    info = read_engine_info(built)
    assert info.outside is not None
    (built / "engine.json").unlink()
    half = (built / info.outside.file).read_bytes()[:1000]
    (built / info.outside.file).write_bytes(half)
    (built / ".weights1.tmp").write_bytes(half)
    again = build_engine(config(bundle), target=target)
    verify_plan(built, again.info)
    assert not (built / ".weights1.tmp").exists()


def test_a_full_disk_is_reported_before_anything_is_written(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="1,000 are free"):
        build_engine(config(bundle), target=target)
    assert find_engines(bundle) == []
    assert not list((bundle / "engines").glob("*/*.weights"))


def test_an_engine_json_with_a_wrong_place_is_refused(built: Path) -> None:
    record = msgspec.json.decode((built / "engine.json").read_bytes())

    def change(**fields: Any) -> bytes:
        return msgspec.json.encode({**record, "outside": {**record["outside"], **fields}})

    with pytest.raises(BundleError, match="names a file outside its directory"):
        decode_engine_info(built, change(file="../weights"))
    tensors = record["outside"]["tensors"]
    for offset in (1, record["outside"]["num_bytes"] + 256 & ~255):
        wrong = {"layers.0.o.own_weights": {**tensors["layers.0.o.own_weights"], "offset": offset}}
        with pytest.raises(BundleError, match=r"is damaged \(where is layers.0.o.own_weights"):
            decode_engine_info(built, change(tensors={**tensors, **wrong}))


@needs_a_runner
def test_an_engine_with_another_input_is_refused(bundle: Path, built: Path) -> None:
    directory, info = only_engine(bundle)
    assert info.outside is not None
    tensors = dict(info.outside.tensors)
    words = tensors["layers.0.o.own_weights"]
    tensors["layers.0.o.own_weights"] = msgspec.structs.replace(words, shape=words.shape[:1])
    changed = msgspec.structs.replace(
        info, outside=msgspec.structs.replace(info.outside, tensors=tensors)
    )
    (directory / "engine.json").write_bytes(msgspec.json.encode(changed))
    with pytest.raises(BackendError, match=r"layers\.0\.o\.own_weights is "):
        TensorRTBackend(bundle, read_manifest(bundle))


# What is left inside


def decoder_of(
    example: Manifest, model: ModelSpec, quant: str, folder: Path
) -> tuple[bytes, Manifest]:
    """A graph in groups of 32, whose weights are zeros that take no room, and a manifest of it."""
    end = 0

    def stored(name: str, bits: int, *dims: int) -> StoredTensor:
        nonlocal end
        element = {4: onnx.TensorProto.INT4, 16: onnx.TensorProto.FLOAT16}[bits]
        size = int(np.prod(dims, dtype=np.int64)) * bits // 8
        end += -end % 4096
        found = StoredTensor(name, element, dims, "decoder.onnx.data", end, size)
        end += size
        return found

    linears, infos = {}, {}
    for each in linear_layers(model):
        planes = quant == "int8" or each.name == "lm_head"  # as the default recipes have it
        depth, columns = each.shape
        scheme = TensorScheme("int8" if planes else "int4", 32, planes=planes)
        made = StoredLinear(
            scheme,
            stored(f"{each.name}.weight", 4, depth, columns),
            stored(f"{each.name}.scale", 16, depth // 32, columns),
            stored(f"{each.name}.bias", 16, columns) if each.biases else None,
        )
        if planes:
            high = stored(f"{each.name}.high_weight", 4, depth, columns)
            scale = stored(f"{each.name}.high_scale", 16, depth // 32, columns)
            made = dataclasses.replace(made, high_weight=high, high_scale=scale)
        linears[each.name] = made
        infos[each.name] = LinearInfo(scheme, each.shape, num_bytes=depth * columns)
    norms = {each.name: stored(each.name, 16, each.size) for each in norm_layers(model)}
    cos, sin = (
        stored(f"rope.{name}", 16, io_spec.rope_positions(model), model.attentions()[0].dim // 2)
        for name in ("cos", "sin")
    )
    graph = build_decoder(
        model, example.dialect, "fp16", DecoderTensors(linears, norms, [(cos, sin)]), 4096
    )
    (folder / "decoder.onnx.data").touch()
    os.truncate(folder / "decoder.onnx.data", end)
    manifest = msgspec.structs.replace(
        example,
        model=model,
        quantization=msgspec.structs.replace(example.quantization, linears=infos),
    )
    return graph.SerializeToString(), manifest


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["portable", "native"])
@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("name", ["deepseek-r1:1.5b", "deepseek-r1:7b", "deepseek-r1:8b"])
def test_no_more_than_10_mb_stay_in_the_engine(
    tiny_bundles: Bundles, tmp_path: Path, name: str, quant: str, dialect: str
) -> None:
    """By graphs of two and three layers: all layers but these are alike."""
    whole = BUILT_IN[name].spec
    inside, outside_bytes = [], []
    for layers in (2, 3):
        model = change_model(whole, num_layers=layers)
        example = read_manifest(tiny_bundles("qwen2", dialect, quant))
        data, manifest = decoder_of(example, model, quant, tmp_path)
        own = use_own_kernels(data, manifest, tmp_path)
        assert own.left == {}
        assert own.outside is not None
        inside.append(sum(constants_inside(own.data).values()))
        outside_bytes.append(own.outside.num_bytes)
    more = whole.num_layers - 2
    assert inside[0] + more * (inside[1] - inside[0]) <= 10e6
    bits = 4.5 if quant == "int4" else 8.5
    layer = sum(np.prod(each.shape) for each in linear_layers(whole)[:4])
    assert outside_bytes[1] - outside_bytes[0] == pytest.approx(layer * bits / 8, rel=0.001)


# Memory


def test_a_build_needs_less_memory_with_own_kernels(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    linears = {
        name: msgspec.structs.replace(each, num_bytes=1 << 30)
        for name, each in manifest.quantization.linears.items()
    }
    size = FileInfo(num_bytes=(len(linears) << 30) + 1000, sha256="0" * 64)
    large = msgspec.structs.replace(
        manifest,
        files={**manifest.files, "decoder.onnx.data": size},
        quantization=msgspec.structs.replace(manifest.quantization, linears=linears),
    )
    with pytest.raises(ResourceError, match=r"building needs about 3\d\.\d GB"):
        check_memory(large, 0, 2 << 30)
    check_memory(large, 0, 2 << 30, kernels="own")
    with pytest.raises(ResourceError, match=r"weights 0\.0"):
        check_memory(large, 0, 1 << 20, kernels="own")


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["portable", "native"])
def test_nvidias_compiler_takes_tables_as_inputs(tiny_bundles: Bundles, dialect: str) -> None:
    """TensorRT for RTX has no plugins, but inputs of static shape, which no profile names."""
    pytest.importorskip("tensorrt_rtx")
    bundle = tiny_bundles("qwen2", dialect, "fp16")
    plan = plan_build(BuildConfig(bundle, max_prefill=32), read_manifest(bundle))
    graph = OnnxFile(graph_of(plan))
    constants = Constants(graph)
    tables = {name: (constants.get(name),) for name in ("rope.cos_table", "rope.sin_table")}
    laid = lay_out(bundle, tables)  # type: ignore[arg-type]
    make_inputs(graph, laid)
    compiler = Compiler(compat.load("tensorrt-rtx"), lambda _level, _text: None)
    network = compiler.parse(graph.serialize(), bundle / "decoder.onnx", "slice")
    assert tables.keys() <= {each.name for each in network.inputs}
    built, _ = compiler.build(
        plan.profiles,
        workspace_bytes=1 << 30,
        opt_level=0,
        timings=None,
        compute_capability="8.6",
        progress=silent,
    )
    assert memoryview(built).nbytes > 0
