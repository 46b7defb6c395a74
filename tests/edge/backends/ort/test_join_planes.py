"""INT8 weights in two planes, joined at load, against the graph as it was exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from edge.backends.ort import cpu as ort
from edge.backends.ort import join_planes as module
from edge.backends.ort import session
from edge.backends.ort.join_planes import join, join_planes
from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.schemes import HIGH_PLANE, PLANES_RANGE, SCHEMES
from edge.errors import BundleError, DependencyError
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize.packing import split_planes
from tests.conftest import Bundles, Checkpoints, require_kernels
from tests.edge.backends.runner import Runner, random_ids
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint

# The same integers and scales in other sums, of products of size one; measured 1e-5.
ATOL = 5e-5


FORMS = pytest.mark.parametrize("level", [None, 4], ids=["DequantizeLinear", "MatMulNBits"])


def joined_graph(bundle: Path, level: int | None = None) -> OnnxFile:
    graph = OnnxFile((bundle / "decoder.cpu.onnx").read_bytes())
    join_planes(graph, bundle, read_manifest(bundle), accuracy_level=level)
    return graph


def joined_values(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> NDArray[np.int8]:
    result = np.empty(2 * low.size, np.uint8)
    join(low, high, result)
    return (result ^ 128).view(np.int8)


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(
        np.int8, st.integers(1, 20).map(lambda n: 2 * n), elements=st.integers(*PLANES_RANGE)
    )
)
def test_join_is_the_inverse_of_split(values: NDArray[np.int8]):
    assert_array_equal(joined_values(*split_planes(values)), values)


def test_every_pair_of_planes_joins_to_its_sum():
    """The least is -136, which no exported weight is; it wraps around."""
    nibbles = np.arange(256, dtype=np.uint8)
    low, high = (plane.reshape(-1) for plane in np.meshgrid(nibbles, nibbles))
    signed = [np.stack([p & 15, p >> 4], axis=1).astype(np.int64) for p in (low, high)]
    below, above = ((part ^ 8) - 8 for part in signed)
    wanted = (HIGH_PLANE * above + below).astype(np.int8).reshape(-1)
    assert_array_equal(joined_values(low, high), wanted)


@FORMS
@pytest.mark.parametrize("quant", ["int8", "int4", "int8-w8a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_weights_are_what_the_file_adds_up_to(
    kind: Kind,
    quant: str,
    level: int | None,
    tiny_bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
):
    """Read by onnx, which knows nothing of planes; ours in chunks that fit no row."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 999)
    onnx = pytest.importorskip("onnx")
    bundle = tiny_bundles(kind, "native", quant)
    model = onnx.load(bundle / "decoder.cpu.onnx")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    graph = joined_graph(bundle, level)
    products = {node.inputs[1]: node for node in graph.nodes if node.op_type == "MatMulNBits"}
    linears = read_manifest(bundle).quantization.linears
    planes = [name for name, linear in linears.items() if linear.scheme.planes]
    assert planes
    packed = [n for n, linear in linears.items() if linear.scheme.kind == "int4" and level]
    assert bool(packed) == (quant == "int4" and level is not None)
    weights = {f"{name}.weight" for name in (*planes, *packed)}
    assert {name for name in graph.in_memory if name.endswith(".weight")} == weights
    assert set(products) == (set() if level is None else weights)
    for name in (*planes, *packed):
        size = linears[name].scheme.group_size
        parts = [
            stored[f"{name}.{part}weight"].astype(np.float32)
            * np.repeat(stored[f"{name}.{part}scale"], size, axis=0)
            for part in (("", "high_") if name in planes else ("",))
        ]
        joined: NDArray[Any] = graph.in_memory[f"{name}.weight"]
        bits = 8 if name in planes else 4
        if bits == 4:
            joined = np.stack([joined & 15, joined >> 4], axis=-1).reshape(*joined.shape[:2], size)
        joined = joined.astype(np.float32) - (1 << bits - 1)
        if level is None:
            joined *= np.repeat(stored[f"{name}.scale"], size, axis=0)
        else:
            joined = (
                (joined * graph.in_memory[f"{name}.scale"].astype(np.float32)[..., None])
                .reshape(len(joined), -1)
                .T
            )
            found = {
                item.name: item.i
                for item in map(
                    onnx.AttributeProto.FromString, products[f"{name}.weight"].attributes
                )
            }
            rows, columns = joined.shape
            sizes = {"K": rows, "N": columns, "bits": bits, "block_size": size}
            assert found == {**sizes, "accuracy_level": level}
        assert_array_equal(joined, sum(parts))


@pytest.mark.parametrize("level", [None, 1], ids=["DequantizeLinear", "MatMulNBits"])
@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_the_joined_graph_computes_the_same(
    dialect: Any,
    quant: str,
    level: int | None,
    tiny_bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
):
    """As one that runs every plane for itself, for a prompt, a chunk and a token."""
    require_kernels(dialect)
    bundle = tiny_bundles("qwen2", dialect, quant)

    def run() -> list[NDArray[Any]]:
        # Float activations, which a last bit rounds no other way; planes stay as they are.
        with Runner(bundle, fuse_attention=False, int8_activations=False) as runner:
            return [
                runner.step(random_ids(2, 17), [0, 1]),
                runner.step(random_ids(1, 5, seed=1)),
                runner.step(random_ids(2, 1, seed=2), [0, 1]),
                runner.cache(0),
            ]

    apart, load = run(), session.load_graph

    def load_joined(path: Path, manifest: Manifest, *args: Any, **options: Any) -> OnnxFile:
        graph = load(path, manifest, *args, **options)
        join_planes(graph, bundle, manifest, accuracy_level=level)
        assert graph.in_memory
        return graph

    monkeypatch.setattr(ort, "load_graph", load_joined)
    for ours, theirs in zip(run(), apart, strict=True):
        assert_allclose(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_packed_here_or_by_onnxruntime_it_computes_the_same_bits(
    quant: str, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """Where there is no room for files in memory, INT4 is left to ONNX Runtime."""
    require_kernels("native")
    bundle = tiny_bundles("qwen2", "native", quant)
    size = sum(x.num_bytes for x in read_manifest(bundle).quantization.linears.values())
    found = []
    for free in (2 * size + 1, 2 * size):
        monkeypatch.setattr(module, "has_room", lambda needed, free=free: free > needed)
        packed = sum(name.endswith(".weight") for name in joined_graph(bundle, 4).in_memory)
        with Runner(bundle, int8_activations=True) as runner:
            logits = [runner.step(random_ids(1, n, seed=n)).ravel() for n in (17, 1, 5, 1)]
        found.append((packed, np.concatenate(logits)))
    for _, others in found[1:]:
        assert_array_equal(others, found[0][1])
    linears = len(read_manifest(bundle).quantization.linears)
    assert [packed for packed, _ in found] == [linears, 1 if quant == "int4" else linears]


@pytest.mark.parametrize("joined", [True, False])
def test_planes_are_joined_where_one_kernel_takes_them(
    joined: bool, tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    """Else ONNX Runtime would unpack the joined weights to float in every step."""
    bundle = tiny_bundles("llama", "portable", "int8")
    for kernel, rounds in ((joined, True), (True, joined)):
        monkeypatch.setattr(ort, "multiplies_8_bits", lambda _, kernel=kernel: kernel)
        graph = ort.load_cpu_graph(
            bundle, read_manifest(bundle), 64, fuse_attention=False, int8_activations=rounds
        )
        assert bool(graph.in_memory) == joined


def test_products_that_we_write_are_those_that_onnxruntime_makes(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
):
    require_kernels("native")

    def write(*args: Any, **_: Any) -> None:
        join_planes(*args)

    logits = []
    for _ in range(2):
        with Runner(tiny_bundles("llama", "native", "int8"), int8_activations=True) as runner:
            logits.append(np.concatenate([runner.step(random_ids(1, n)) for n in (17, 1)], axis=1))
        monkeypatch.setattr(ort, "join_planes", write)
    assert_allclose(logits[0], logits[1], atol=ATOL, rtol=0)


def test_rows_that_end_within_a_byte_are_joined_too(tmp_path: Path):
    """An odd vocabulary: its lm_head stays a MatMul for ONNX Runtime to fuse."""
    require_kernels("native")
    source = write_checkpoint(tmp_path / "source", "llama", vocab_size=321)
    logits = []
    for quant in ("int8", "fp16"):
        bundle = tmp_path / quant
        export_checkpoint(
            ExportConfig(source=str(source), output=bundle, quant=quant, kv_capacity=64)
        )
        with Runner(bundle) as runner:
            logits.append(runner.step(random_ids(1, 17)).ravel())
    graph = OnnxFile(joined_graph(tmp_path / "int8", 4).serialize())
    assert [node.op_type for node in graph.nodes].count("DequantizeLinear") == 1
    assert np.dot(*logits) / np.prod([np.linalg.norm(each) for each in logits]) > 0.999


def test_a_bundle_of_blocked_int8_still_runs(
    tiny_checkpoints: Checkpoints,
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """As edge-llm wrote it before planes; it rounds weights a little otherwise."""
    require_kernels("native")
    facts = dataclasses.replace(SCHEMES["int8"], planes=False)
    monkeypatch.setitem(SCHEMES, "int8", facts)
    old = tmp_path / "old"
    export_checkpoint(
        ExportConfig(
            source=str(tiny_checkpoints("qwen2")), output=old, quant="int8", kv_capacity=64
        )
    )
    scheme = read_manifest(old).quantization.linears["lm_head"].scheme
    assert (str(scheme), joined_graph(old).in_memory) == ("int8-g64", {})
    logits = []
    for bundle in (old, tiny_bundles("qwen2", "native", "int8")):
        with Runner(bundle) as runner:
            logits.append(runner.step(random_ids(1, 17)).ravel())
    cosine = np.dot(*logits) / np.prod([np.linalg.norm(each) for each in logits])
    assert 0.999 < cosine < 1.0
    monkeypatch.setattr(session, "multiplies_8_bits", lambda _: False)
    with pytest.raises(DependencyError, match=r"in one piece.*found .*export the model again"):
        Runner(old, int8_activations=True)


@FORMS
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_high_planes_is_left(kind: Kind, level: int | None, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind, "native", "int8")
    graph = joined_graph(bundle, level)
    again = OnnxFile(graph.serialize())
    tensors = again.external_tensors()
    kinds = [tensor.dtype for name, tensor in tensors.items() if name.endswith(".weight")]
    linears = 4 * read_manifest(bundle).model.num_layers + 1
    assert (kinds.count("uint8"), kinds.count("int4")) == (linears, 0)
    ops = [node.op_type for node in again.nodes]
    found = ops.count("DequantizeLinear"), ops.count("MatMulNBits")
    assert found == ((linears, 0) if level is None else (0, linears))
    assert not any("high" in name for name in tensors)


def test_a_bundle_without_planes_is_left_alone(tiny_bundles: Bundles):
    bundle = tiny_bundles("llama", "native", "fp16")
    before = (bundle / "decoder.cpu.onnx").read_bytes()
    graph = joined_graph(bundle)
    assert graph.in_memory == {}
    assert graph.serialize() == before


@pytest.mark.parametrize("op_type", ["DequantizeLinear", "MatMul", "Add"])
def test_another_shape_of_graph_is_refused(op_type: str, tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "native", "int8")
    graph = OnnxFile((bundle / "decoder.cpu.onnx").read_bytes())
    for node in graph.nodes:
        if node.op_type == op_type:
            node.op_type = "Identity"
    with pytest.raises(BundleError, match=f"has Identity at .*, expected {op_type}"):
        join_planes(graph, bundle, read_manifest(bundle))
