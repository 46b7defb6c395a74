"""Engines of bundles that take adapters: what trtexec is told, rules, and own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from engines.build_plan import plan_build
from engines.config import BuildConfig
from engines.graph.own_kernels import use_own_kernels
from engines.rules.check import check_graph
from engines.rules.table import VERSIONS
from engines.trtexec.command import trtexec_command
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import TINY_KV_CAPACITY, Checkpoints

RANK = 8


@pytest.fixture(scope="module")
def bundles(tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[Any, ...], Path] = {}

    def bundle(quant: Any, dialect: Any, adapters: int | None = RANK) -> Path:
        key = quant, dialect, adapters
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            export_checkpoint(
                ExportConfig(
                    source=str(tiny_checkpoints("qwen2")),
                    output=made[key],
                    quant=quant,
                    method="rtn" if quant == "int4" else None,
                    group_size=32,
                    rotate=False,
                    dialect=dialect,
                    adapters=adapters,
                    kv_capacity=TINY_KV_CAPACITY,
                )
            )
        return made[key]

    return bundle


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_every_version_that_takes_the_plain_graph_takes_it_with_adapters(
    quant: str, dialect: str, bundles: Any
):
    legal = []
    for adapters in (None, RANK):
        path = bundles(quant, dialect, adapters) / "decoder.onnx"
        verdicts = check_graph(path.read_bytes(), path.parent, VERSIONS)
        legal.append([(str(each.version), each.legal, len(each.refusals)) for each in verdicts])
    assert legal[0] == legal[1]
    assert any(each[1] for each in legal[1])


def test_trtexec_is_told_one_shape_for_all_layers(bundles: Any):
    bundle = bundles("int4", "portable")
    build = plan_build(BuildConfig(bundle=bundle, max_prefill=24), read_manifest(bundle))
    line = trtexec_command(build, (10, 3))
    shapes = [part for part in line if part.startswith("--minShapes")]
    assert len(shapes) == len(build.profiles) == 4
    found = [dict(entry.split(":") for entry in part.split("=")[1].split(",")) for part in shapes]
    assert found[0]["adapters.layers.*.qkv.a"] == "1x0x64"
    assert found[2]["adapters.layers.*.qkv.a"] == f"1x{3 * RANK}x64"
    assert found[2]["adapters.layers.*.gate_up.b"] == f"1x256x{2 * RANK}"
    assert sum(name.startswith("adapters.") for name in found[0]) == 8


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_own_kernels_compute_the_same_layers_with_adapters_behind(quant: str, bundles: Any):
    nodes = []
    for adapters in (None, RANK):
        bundle = bundles(quant, "native", adapters)
        data = (bundle / "decoder.onnx").read_bytes()
        own = use_own_kernels(data, read_manifest(bundle), bundle)
        assert own.left == {}
        plugins = [node for node in OnnxFile(own.data).nodes if node.op_type == "w4_linear"]
        nodes.append([(node.name, node.inputs[2:]) for node in plugins])
        sums = [
            n for n in OnnxFile(own.data).nodes if n.op_type == "Add" and "adapter" in n.inputs[1]
        ]
        assert len(sums) == (0 if adapters is None else 8)
    assert nodes[0] == nodes[1]  # with the same scales and biases
