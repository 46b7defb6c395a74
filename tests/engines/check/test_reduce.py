from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.bundle.onnx_values import Constants
from edge.errors import BuildError, ConfigError, DependencyError
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from engines.check import reduce
from engines.check.reduce import reduce_bundle, shrink
from engines.cli import check
from engines.compiler import compat
from engines.config import BuildConfig
from engines.graph.adapt import has_half_scales
from tests.conftest import RUNNABLE, Bundles

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("polygraphy")
SIZE = ["--max-prefill", "32"]


def edit(bundle: Path, change: Callable[[OnnxFile], None]) -> None:
    """Change the decoder's graph; the manifest vouches for it."""
    manifest = read_manifest(bundle)
    path = bundle / manifest.graphs.decoder
    graph = OnnxFile(path.read_bytes())
    change(graph)
    path.write_bytes(graph.serialize())
    files = {**manifest.files, path.name: sha256_file(path)}
    (bundle / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))


def node(graph: OnnxFile, name: str) -> Node:
    return next(each for each in graph.nodes if each.outputs[0] == name)


def run(*arguments: str):
    return CliRunner().invoke(check, list(arguments), catch_exceptions=False)


@given(st.integers(1, 40), st.data())
def test_what_is_left_is_needed_node_by_node(count: int, data: st.DataObject) -> None:
    culprits = set(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))
    tried = 0

    def fails(nodes: Sequence[int]) -> bool:
        nonlocal tried
        tried += 1
        return culprits <= set(nodes)

    assert shrink(count, fails) == sorted(culprits)


def test_one_culprit_of_many_nodes_is_found_in_few_trials() -> None:
    tried: list[int] = []

    def fails(nodes: Sequence[int]) -> bool:
        tried.append(len(nodes))
        return 700 in nodes

    assert shrink(1000, fails) == [700]
    assert len(tried) < 40


def test_an_unknown_operator_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    edit(bundle, lambda g: setattr(node(g, "layers.1.gate.sigmoid"), "op_type", "Nonsense"))
    out = tmp_path / "small.onnx"
    found = json.loads(run(str(bundle), *SIZE, "--reduce", str(out), "--json").stdout)
    assert found["nodes"] == ["Nonsense layers.1.gate.sigmoid/Sigmoid"]
    assert found["inputs"] == ["layers.1.gate float16 ['batch', 'seq', 128]"]
    assert found["step"] == "parse"
    assert found["weights"] is None
    assert found["num_bytes"] == out.stat().st_size < 1000
    assert found["nodes_before"] > 70
    assert "Plugin not found" in found["error"]
    assert [each.op_type for each in OnnxFile(out.read_bytes()).nodes] == ["Nonsense"]


def test_weights_that_are_refused_go_into_the_file(bundle: Path, tmp_path: Path) -> None:
    def blocks_of_no_width(graph: OnnxFile) -> None:
        weight = node(graph, "layers.0.o.dequantized")
        weight.inputs[1] = "layers.1.o.scale"  # one more node's constants
        weight.inputs.append("layers.0.input_norm.weight")  # a float zero point

    edit(bundle, blocks_of_no_width)
    out = tmp_path / "small.onnx"
    text = run(str(bundle), *SIZE, "--reduce", str(out)).stdout
    assert "node: DequantizeLinear layers.0.o.dequantized" in text
    assert "1 of " in text
    (left,) = OnnxFile(out.read_bytes()).nodes
    assert left.op_type == "DequantizeLinear"
    graph = OnnxFile(out.read_bytes())
    assert not graph.external_tensors()
    command = text.rstrip().rpartition("reproduce with: ")[2]
    words = shlex.split(command)
    assert words[0] == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    words[1:2] = [sys.executable, str(Path(sys.executable).with_name("polygraphy"))]
    again = subprocess.run(
        words[1:],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode != 0
    assert "DequantizeLinear" in again.stdout + again.stderr


def test_many_weights_go_beside_the_file(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "_INLINE_BYTES", 0)
    edit(bundle, lambda g: node(g, "layers.0.o.dequantized").inputs.append("layers.0.o.scale"))
    out = tmp_path / "small.onnx"
    found = reduce_bundle(BuildConfig(bundle, max_prefill=32), out, 86)
    assert found.weights == str(tmp_path / "small.onnx.data")
    assert found.num_bytes == out.stat().st_size + Path(found.weights).stat().st_size
    assert OnnxFile(out.read_bytes()).external_tensors()


def test_a_refusal_of_the_builder_is_reduced_with_fixed_sizes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = compat.Compiler.build

    def refuse_rope(self: compat.Compiler, *arguments: Any, **options: Any) -> Any:
        names = {out.name for layer in self.view().layers for out in layer.outputs}
        if {"layers.1.gate.sigmoid", "layers.1.gated"} <= names:
            raise BuildError("no implementation for layers.1", "no implementation")
        return build(self, *arguments, **options)

    monkeypatch.setattr(compat.Compiler, "build", refuse_rope)
    out = tmp_path / "small.onnx"
    found = reduce_bundle(BuildConfig(bundle, max_prefill=32), out, 86)
    assert found.step == "build"
    operators = [each.partition(" ")[0] for each in found.nodes]
    assert operators == ["Sigmoid", "Mul"]
    assert found.sizes["seq"] == 32
    assert all("'" not in each for each in (*found.inputs, *found.outputs))


def test_a_bundle_that_is_taken_has_nothing_to_reduce(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    with pytest.raises(ConfigError, match="nothing to reduce") as refused:
        run(str(bundle), *SIZE, "--reduce", str(out))
    assert refused.value.exit_code == 64
    assert not out.exists()


@pytest.mark.parametrize("name", ["small.onnx", "small.onnx.data"])
def test_nothing_is_overwritten(bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        run(str(bundle), *SIZE, "--reduce", str(tmp_path / "small.onnx"))
    assert (tmp_path / name).read_text() == "mine"
    assert {each.name for each in tmp_path.iterdir()} == {"bundle", name}


def test_options_that_do_not_go_together(bundle: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "small.onnx")
    with pytest.raises(ConfigError, match="--kv-read"):
        run(str(bundle), *SIZE, "--kv-read", "lengths", "--reduce", out)
    with pytest.raises(ConfigError, match="--reduce has no effect with --trt"):
        run(str(bundle), "--trt", "10.3", "--reduce", out)
    with pytest.raises(ConfigError, match="no directory"):
        run(str(bundle), *SIZE, "--reduce", str(tmp_path / "none" / "small.onnx"))


@pytest.mark.parametrize("missing", ["polygraphy", "onnx_graphsurgeon"])
def test_a_missing_package_names_the_extra(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DependencyError, match=r"\[check\]"):
        run(str(bundle), *SIZE, "--reduce", str(tmp_path / "small.onnx"))


def test_another_fault_is_not_taken_for_the_first(bundle: Path, tmp_path: Path) -> None:
    def plant(graph: OnnxFile) -> None:
        node(graph, "layers.0.o.dequantized").inputs.append("layers.0.o.scale")
        node(graph, "layers.1.gate.sigmoid").op_type = "Nonsense"

    edit(bundle, plant)
    found = reduce_bundle(BuildConfig(bundle, max_prefill=32), tmp_path / "small.onnx", 86)
    assert [each.partition(" ")[0] for each in found.nodes] == ["DequantizeLinear"]


@pytest.mark.parametrize("refused", ["half scales", "rounding"])
def test_the_last_variant_has_its_scales_in_fp32(
    tiny_bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    class Refusing:
        def __init__(self, *_: object) -> None: ...

        def parse(self, graph: bytes, *_: object) -> None:
            rounds = any(each.op_type == "QuantizeLinear" for each in OnnxFile(graph).nodes)
            if has_half_scales(graph) if refused == "half scales" else rounds:
                raise BuildError(refused)

        def build(self, *_: object, **_options: object) -> None: ...

    monkeypatch.setattr(reduce, "Compiler", Refusing)
    bundle, out = tiny_bundles("qwen2", RUNNABLE, "int8-w8a8"), tmp_path / "small.onnx"
    config = BuildConfig(bundle, max_prefill=32)
    if refused == "half scales":
        with pytest.raises(ConfigError, match="nothing to reduce"):
            reduce_bundle(config, out, 86)
        return
    found = reduce_bundle(config, out, 86)
    assert [each.partition(" ")[0] for each in found.nodes] == ["QuantizeLinear"]
    graph = OnnxFile(out.read_bytes())
    scale = Constants(graph).get(graph.nodes[0].inputs[1])
    assert scale is not None
    assert scale.dtype == "fp32"
