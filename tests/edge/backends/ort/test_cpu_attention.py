"""The rewrite of attention for the CPU against the graph as it was exported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

from edge.backends.ort.cpu_attention import can_fuse, fuse_cache_attention
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.errors import BundleError, ConfigError
from tests.conftest import FEW_TOKENS, TINY_KV_CAPACITY, Bundles, require_kernels
from tests.edge.backends.runner import Runner, history
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint

# Sums of at most 128 products of size one in another order; measured 1e-5.
ATOL = 5e-5


@pytest.fixture(autouse=True)
def _kernels() -> None:
    require_kernels("native")


@pytest.mark.parametrize("quant", ["fp16", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rewritten_graph_computes_the_same(kind: Kind, quant: str, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind, "native", quant)
    # An input that differs in its last bits may round to another integer, which moved the logits
    # of two by 0.1; their inputs stay floats here.
    exact = {"int8_activations": False} if kind in ("smollm3", "granite") else {}
    with Runner(bundle, **exact) as fused, Runner(bundle, fuse_attention=False, **exact) as plain:
        for ours, theirs in zip(history(fused), history(plain), strict=True):
            assert_allclose(ours, theirs, atol=ATOL, rtol=0)


def export_heads(
    root: Path, kind: Kind, head_dim: int, dialect: Any, kv_cache: Any = "float"
) -> Path:
    """Export a tiny model with heads of another size."""
    from export.pipeline import ExportConfig, export_checkpoint

    source = write_checkpoint(root / "model", kind, head_dim=head_dim, rope_scaling=None)
    config = ExportConfig(
        source=str(source),
        output=root / dialect,
        quant="fp16",
        dialect=dialect,
        kv_cache=kv_cache,
        calibration_tokens=FEW_TOKENS if kv_cache == "int8" else None,
        kv_capacity=TINY_KV_CAPACITY,
    )
    export_checkpoint(config)
    return config.output


@pytest.mark.parametrize(
    ("kind", "head_dim", "fuses"),
    [("llama", 20, False), ("llama", 40, False), ("qwen3", 20, False), ("qwen3", 40, True)],
)
def test_heads_that_the_operator_does_not_take_are_left_to_the_graph(
    kind: Kind, head_dim: int, fuses: bool, tmp_path: Path
):
    found = []
    for dialect in ("native", "portable"):
        with Runner(export_heads(tmp_path, kind, head_dim, dialect)) as runner:
            found.append(history(runner))
            assert can_fuse(runner.manifest) == (fuses and dialect == "native")
    for ours, theirs in zip(*found, strict=True):
        assert_allclose(ours, theirs, atol=ATOL, rtol=0)
    if not fuses:
        with pytest.raises(ConfigError, match="does not take this model"):
            Runner(tmp_path / "native", deterministic=True)


@pytest.mark.parametrize("quant", ["fp16", "int4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_onnx_runtime_makes_of_a_bundle(
    kind: Kind, quant: str, tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One GroupQueryAttention per layer; integer weights stay integers inside MatMulNBits."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime as ort

    path = tmp_path / "optimized.onnx"

    class Saving(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.optimized_model_filepath = str(path)

    monkeypatch.setattr(ort, "SessionOptions", Saving)
    with Runner(tiny_bundles(kind, "native", quant)) as runner:
        num_layers = runner.manifest.model.num_layers
        schemes_of = [info.scheme for info in runner.manifest.quantization.linears.values()]
    nodes = onnx.load(path, load_external_data=False).graph.node
    ops = Counter(node.op_type for node in nodes)
    assert ops["GroupQueryAttention"] == num_layers
    assert not {"Attention", "TensorScatter", "Slice"} & ops.keys()
    if quant == "fp16":
        assert ops["MatMulNBits"] == 0
    else:
        assert ops["MatMulNBits"] == len(schemes_of) == 4 * num_layers + 1
        assert not {"MatMul", "Gemm", "DequantizeLinear"} & ops.keys()
        fused = [
            {attribute.name: attribute.i for attribute in node.attribute}
            for node in nodes
            if node.op_type == "MatMulNBits"
        ]
        # The schemes of the recipe (int4 keeps the lm_head int8), in groups of 32.
        schemes = Counter((int(s.kind.removeprefix("int")), s.group_size) for s in schemes_of)
        assert Counter((node["bits"], node["block_size"]) for node in fused) == schemes
        assert {node["accuracy_level"] for node in fused} == {4}  # int8 activations: the fastest


def load(bundle: Path) -> OnnxFile:
    return OnnxFile((bundle / "decoder.cpu.onnx").read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_the_rewrite_leaves_only_what_is_used(kind: Kind, tiny_bundles: Bundles):
    bundle = tiny_bundles(kind)
    before = (bundle / "decoder.cpu.onnx").read_bytes()
    file = load(bundle)
    inputs, outputs = file.inputs, file.outputs
    fuse_cache_attention(file, read_manifest(bundle).model)
    again = OnnxFile(file.serialize())
    assert (again.inputs, again.outputs) == (inputs, outputs)
    # The tokens of a step lie as [B, S, heads * D] from projection to projection.
    assert not {node.op_type for node in again.nodes} & {"Transpose", "Slice", "TensorScatter"}
    made = {info.name for info in again.inputs}
    onnx = pytest.importorskip("onnx")
    made |= {t.name for t in onnx.load_from_string(again.serialize()).graph.initializer}
    for node in again.nodes:  # in topological order
        assert made.issuperset(filter(None, node.inputs)), node
        assert made.isdisjoint(node.outputs), node
        made.update(node.outputs)
    assert (bundle / "decoder.cpu.onnx").read_bytes() == before


def test_a_graph_without_our_attention_is_refused(tiny_bundles: Bundles):
    bundle = tiny_bundles("qwen2", "portable")
    with pytest.raises(BundleError, match="0 Attention nodes for 2 layers"):
        fuse_cache_attention(load(bundle), read_manifest(bundle).model)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_mask_other_than_the_causal_one_is_refused(kind: Kind, layer: int, tiny_bundles: Bundles):
    """A window, say: the operator that takes its place reads no mask."""
    bundle = tiny_bundles(kind)
    file = load(bundle)
    window = Node("And", ["mask", "mask"], ["mask.window"], "mask.window/And")
    [node for node in file.nodes if node.op_type == "Attention"][layer].inputs[3] = "mask.window"
    place = next(i for i, node in enumerate(file.nodes) if "mask" in node.outputs)
    file.nodes = [*file.nodes[: place + 1], window, *file.nodes[place + 1 :]]
    with pytest.raises(BundleError, match=f"layers.{layer}.attended has a mask, 'mask.window'"):
        fuse_cache_attention(file, read_manifest(bundle).model)


@pytest.mark.parametrize(
    "op_type", ["Slice", "TensorScatter", "RotaryEmbedding", "Transpose", "Reshape"]
)
def test_another_shape_of_graph_is_refused(op_type: str, tiny_bundles: Bundles):
    """Rather than to rewrite what only looks alike."""
    bundle = tiny_bundles("qwen2")
    file = load(bundle)
    for node in file.nodes:
        if node.op_type == op_type:
            node.op_type = "Identity"
    with pytest.raises(BundleError, match=f"has Identity at .*, expected {op_type}"):
        fuse_cache_attention(file, read_manifest(bundle).model)
