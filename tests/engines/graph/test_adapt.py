"""The graph that an engine is built from keeps what the bundle's graph masks."""

from __future__ import annotations

import pytest

from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.errors import BundleError
from engines.config import BuildConfig, resolve
from engines.graph.adapt import prepare_graph
from tests.conftest import Bundles


def test_lengths_refuse_to_drop_a_mask_that_is_not_causal(tiny_bundles: Bundles) -> None:
    """A window, say: attention by lengths reads no mask."""
    bundle = tiny_bundles("qwen2", "native", "int4")
    data, manifest = (bundle / "decoder.onnx").read_bytes(), read_manifest(bundle)
    shapes = resolve(BuildConfig(bundle, max_prefill=32), manifest)
    assert prepare_graph(data, shapes, "lengths") == prepare_graph(data, shapes, "full")
    graph = OnnxFile(data)
    place = next(i for i, node in enumerate(graph.nodes) if "mask" in node.outputs)
    window = Node("And", ["mask", "mask"], ["mask.window"], "mask.window/And")
    graph.nodes = [*graph.nodes[: place + 1], window, *graph.nodes[place + 1 :]]
    [node for node in graph.nodes if node.op_type == "Attention"][-1].inputs[3] = "mask.window"
    windowed = graph.serialize()
    for kept in ("slice", "full"):
        assert b"mask.window" in prepare_graph(windowed, shapes, kept)
    with pytest.raises(BundleError, match=r"has a mask, 'mask.window', .* leave --kv-read out"):
        prepare_graph(windowed, shapes, "lengths")
