"""Rewrites graphs and builds engines with own kernels, and holds them against the bundle."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.bundle.engine_file import EngineInfo, find_engines, read_engine_info
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import Node, OnnxFile, attribute
from edge.bundle.onnx_values import Constants, node_attributes
from edge.device.gpu import Gpu
from engines.builder import build as build_module
from engines.builder.target import Target
from engines.cli import build
from engines.compiler.compat import TensorRT
from engines.graph.own_kernels import OwnGraph, use_own_kernels
from engines.kernels.layout import unpack_weights
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import RUNNABLE
from tests.standins.cuda import FakeGpu
from tests.standins.plugin import PLUGINS
from tests.standins.tensorrt import emptied, install, make_module

JETPACK6 = "10.3.0.30"
needs_a_runner = pytest.mark.skipif(
    RUNNABLE != "native", reason="needs ONNX Runtime >= 1.26 for dialect native"
)


def rewrite(bundle: Path, data: bytes | None = None) -> OwnGraph:
    graph = data or (bundle / "decoder.onnx").read_bytes()
    return use_own_kernels(graph, read_manifest(bundle), bundle)


def weights_of(own: OwnGraph) -> dict[str, NDArray[Any]]:
    """What goes into the file, by the names of the inputs."""
    if own.outside is None:
        return {}
    file = io.BytesIO()
    sha256 = own.outside.write(file)
    data = file.getvalue()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (own.outside.num_bytes, sha256)
    kinds = {"int32": np.int32, "fp16": np.float16}
    return {
        name: np.frombuffer(data[each.offset : each.end], kinds[each.dtype]).reshape(each.shape)
        for name, each in own.outside.tensors.items()
    }


def export(source: Path, output: Path, **options: Any) -> Path:
    config = {"quant": "int4", "dialect": "portable", "kv_capacity": 64, **options}
    if config["quant"] == "int4":
        config.setdefault("method", "rtn")
    export_checkpoint(ExportConfig(source=str(source), output=output, **config))
    return output


def put(node: Node, **attributes: Any) -> None:
    """Give a node these attributes, too."""
    kept = {**node_attributes(node), **attributes}
    node.attributes = [attribute(name, value) for name, value in kept.items()]


def check_graph(bundle: Path, own: OwnGraph) -> None:
    """Nothing is left over of what was replaced, and what the plugins read is outside."""
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
    outside = weights_of(own)
    assert outside.keys() <= {info.name for info in after.inputs} - constants.initializers
    old = Constants(before, bundle)
    for node in plugins:
        assert set(node.inputs[1:]) <= outside.keys()
        name = node.name.removesuffix("/w4_linear")
        for place, plane in enumerate(unpack_weights(outside[node.inputs[1]])):
            part = "high_" if place else ""
            assert_array_equal(plane, _stored(before, old, f"{name}.{part}dequantized", bundle))
        for other in {*node.inputs[2:]} - {"own_kernels.no_bias"}:
            values = old.values(other)
            assert values is not None
            assert_array_equal(outside[other].ravel(), values)
    assert own.path == bundle.resolve() / "decoder.onnx"
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
def target(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Target:
    found = target_of(gpu)
    monkeypatch.setattr(build_module, "find_target", lambda **_options: found)
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
