"""Bundles that take adapters: what their graphs have more, and the channels that adapters meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edge.adapters.graph_inputs import (
    FACTORS_NAME,
    SECTION,
    Basis,
    adapted_linears,
    adapter_inputs,
    read_basis,
    read_section,
    slot_values,
)
from edge.bundle.manifest import FloatType, read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.errors import BundleError, ConfigError
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize.scaled_checkpoint import ScaledCheckpoint
from export.sources.opening import open_checkpoint
from tests.conftest import FEW_TOKENS, TINY_KV_CAPACITY, Checkpoints
from tests.makers.dense import dense
from tests.makers.run_time_adapters import MergedCheckpoint, random_adapter
from tests.makers.tiny_models import KINDS, Kind, write_checkpoint
from tests.makers.tiny_pooling import write_judge

RANK = 8
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Export:
    def run(kind: Kind = "qwen2", **options: Any) -> Path:
        output = tmp_path_factory.mktemp("bundles") / "bundle"
        config: dict[str, Any] = {"quant": "fp16", "kv_capacity": TINY_KV_CAPACITY, **options}
        source = str(tiny_checkpoints(kind))
        export_checkpoint(ExportConfig(source=source, output=output, **config))
        return output

    return run


# ------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_with_adapters_is_the_plain_one_and_their_nodes(
    kind: Kind, dialect: str, export: Export
):
    plain, adapted = (export(kind, dialect=dialect, adapters=rank) for rank in (None, RANK))
    manifest = read_manifest(adapted)
    for name, float_type in (("decoder.onnx", "fp16"), ("decoder.cpu.onnx", "fp32")):
        graph, more = (OnnxFile((each / name).read_bytes()) for each in (plain, adapted))
        specs = adapter_inputs(manifest, cast(FloatType, float_type))
        found = more.inputs[len(graph.inputs) :]
        assert [(v.name, v.dtype, v.shape) for v in found] == [
            (s.name, s.dtype, s.shape) for s in specs
        ]
        assert more.inputs[: len(graph.inputs)] == graph.inputs
        assert more.outputs == graph.outputs
        assert more.initializers == graph.initializers
        count = len(adapted_linears(manifest.model))
        extra = Counter(node.op_type for node in more.nodes)
        extra.subtract(Counter(node.op_type for node in graph.nodes))
        assert +extra == {"Transpose": 2 * count, "MatMul": 2 * count, "Add": count}
        assert not -extra


def test_the_sum_is_where_each_engine_wants_it(export: Export):
    """TensorRT before the bias; ONNX Runtime's products take a bias that comes next."""
    bundle = export(adapters=RANK)
    for name, addends in (("decoder.onnx", "adapter bias"), ("decoder.cpu.onnx", "bias adapter")):
        nodes = OnnxFile((bundle / name).read_bytes()).nodes
        makers = {output: node for node in nodes for output in node.outputs}
        last = makers["layers.0.qkv.out"]
        before = makers[last.inputs[0]]
        assert before.inputs[0] == "layers.0.qkv.product"
        found = [each.inputs[1].removeprefix("layers.0.qkv.") for each in (before, last)]
        assert [each.split(".")[0] for each in found] == addends.split()


def test_a_bundle_without_the_option_says_nothing_of_adapters(export: Export):
    manifest = read_manifest(export(adapters=None))
    assert SECTION not in manifest.extras
    assert read_section(manifest) is None
    assert adapter_inputs(manifest, "fp32") == []


def test_the_section_names_all_linears_but_the_head(export: Export):
    manifest = read_manifest(export(adapters=RANK))
    section = read_section(manifest)
    assert section is not None
    assert section.rank == RANK
    kinds = ("qkv", "o", "gate_up", "down")
    assert section.linears == tuple(
        f"layers.{i}.{kind}" for i in range(manifest.model.num_layers) for kind in kinds
    )
    model = manifest.model
    hidden, wide = model.hidden_size, dense(model).intermediate_size
    attention = model.attentions()[0]
    qkv = hidden + (attention.heads + 2 * attention.kv_heads) * attention.dim
    values = 3 * qkv + 2 * hidden + 2 * (hidden + 2 * wide) + (wide + hidden)
    assert slot_values(model, RANK) == RANK * values * model.num_layers


def test_a_section_of_another_model_is_refused(export: Export):
    manifest = read_manifest(export(adapters=RANK))
    extras = {SECTION: {"rank": RANK, "linears": ["layers.0.qkv"]}}
    with pytest.raises(BundleError, match="does not name the linears"):
        read_section(msgspec.structs.replace(manifest, extras=extras))


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize("rank", [0, 129, -1])
def test_a_rank_out_of_range_is_refused(rank: int):
    with pytest.raises(ConfigError, match="1 to 128"):
        ExportConfig(source="x", output=Path("y"), adapters=rank)


def test_rotations_and_adapters_exclude_each_other(export: Export):
    for options in ({"quant": "int8-w8a8"}, {"quant": "int8", "rotate": True}):
        with pytest.raises(ConfigError, match="--no-rotate"):
            ExportConfig(source="x", output=Path("y"), adapters=RANK, **options)
    bundle = export(quant="int8", group_size=32, adapters=RANK)
    assert not read_manifest(bundle).quantization.rotated


def test_a_model_that_judges_takes_no_adapters(tmp_path: Path):
    write_judge(tmp_path / "judge")
    config = ExportConfig(
        source=str(tmp_path / "judge"), output=tmp_path / "b", task="rerank", adapters=RANK
    )
    with pytest.raises(ConfigError, match="--adapters is for models that generate"):
        export_checkpoint(config)


# ------------------------------------------------------------------------------- folded factors


def test_an_adapter_in_the_basis_of_a_bundle_is_the_folded_change_of_weights(tmp_path: Path):
    source = str(write_checkpoint(tmp_path / "model", "qwen2"))
    random = np.random.default_rng(1)
    with open_checkpoint(source) as checkpoint:
        model = checkpoint.spec
        factors = {}
        for layer in adapted_linears(model):
            values = random.uniform(0.5, 2, layer.shape[0]).astype(np.float32)
            values *= random.choice(np.array([-1, 1], np.float32), layer.shape[0])
            if layer.name.endswith(".o"):
                (attention,) = model.of_layer(0).attentions()
                groups = values.reshape(attention.kv_heads, -1, attention.dim)
                groups[:] = groups[:, :1]
            factors[layer.name] = values
        adapter = random_adapter(model, 4)
        merged = MergedCheckpoint(checkpoint, adapter)
        before, after = ScaledCheckpoint(checkpoint, factors), ScaledCheckpoint(merged, factors)
        basis = Basis(model, factors)
        for layer in adapted_linears(model):
            a, b = basis(layer, *adapter.tensors[layer.name])
            change = [after.tensor(n) - before.tensor(n) for n in layer.weights]
            assert_allclose(b @ a, np.concatenate(change), atol=1e-5, err_msg=layer.name)


def test_a_calibrated_bundle_keeps_the_factors_of_its_layers(export: Export):
    bundle = export(
        quant="int4", method="awq", group_size=32, calibration_tokens=FEW_TOKENS, adapters=RANK
    )
    manifest = read_manifest(bundle)
    assert FACTORS_NAME in manifest.files
    layer = adapted_linears(manifest.model)[0]
    a, b = random_adapter(manifest.model, 2).tensors[layer.name]
    changed, _ = read_basis(bundle, manifest)(layer, a, b)
    assert (changed != a).any()
    (bundle / FACTORS_NAME).write_bytes((bundle / FACTORS_NAME).read_bytes()[:-8])
    with pytest.raises(BundleError, match="factors"):
        read_basis(bundle, manifest)


def test_a_rounded_bundle_needs_no_factors(export: Export):
    bundle = export(quant="int4", method="rtn", group_size=32, adapters=RANK)
    manifest = read_manifest(bundle)
    assert FACTORS_NAME not in manifest.files
    layer = adapted_linears(manifest.model)[0]
    pair = random_adapter(manifest.model, 2).tensors[layer.name]
    for before, after in zip(pair, read_basis(bundle, manifest)(layer, *pair), strict=True):
        assert_array_equal(before, after)
