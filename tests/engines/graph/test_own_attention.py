"""``build --kernels own``: attention in plugins, the same answers, and what is left to TensorRT."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from edge.bundle import io_spec
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.bundle.onnx_values import node_attributes
from edge.errors import BuildError
from edge.model.cache import cache_tensors
from engines.build_plan import plan_build
from engines.compiler import compat
from engines.compiler.compat import Compiler
from engines.config import BuildConfig
from engines.graph.adapt import graph_of
from engines.graph.own_attention import use_own_attention
from engines.graph.own_kernels import OwnGraph, use_own_kernels
from export.pipeline import ExportConfig, export_checkpoint
from tests.engines.own_builds import put, weights_of
from tests.makers.manifests import change_model
from tests.makers.tiny_models import Kind, write_checkpoint
from tests.standins.own_kernels import compute_all

Bundle = Callable[..., Path]
CAPACITY = 64
# Of a logit: scores, weights and mixes are rounded to FP16 in the graph, and in the plugin not.
LOGITS_TOLERANCE = 0.06


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exports a tiny bundle whose heads have 64 values, or another number."""
    root = tmp_path_factory.mktemp("wide")

    @functools.cache
    def make(
        dialect: Any,
        quant: Any = "fp16",
        width: int = 64,
        kv_cache: Any = "float",
        kind: Kind = "qwen3",
    ) -> Path:
        name = f"{dialect}-{quant}-{width}-{kv_cache}-{kind}"
        source = write_checkpoint(root / f"{name}-source", kind, head_dim=width)
        config = ExportConfig(
            source=str(source),
            output=root / name,
            quant=quant,
            group_size=32 if quant.startswith("int") else None,
            method="rtn" if quant == "int4" else None,
            dialect=dialect,
            kv_cache=kv_cache,
            kv_capacity=CAPACITY,
        )
        export_checkpoint(config)
        return root / name

    return make


def rewrite(bundle: Path, data: bytes | None = None, plugins: Any = "compiled") -> OwnGraph:
    graph = data or (bundle / "decoder.onnx").read_bytes()
    return use_own_kernels(graph, read_manifest(bundle), bundle, plugins, attention=True)


def feed_of(bundle: Path, starts: list[int], tokens: int, rows: int = CAPACITY) -> dict[str, Any]:
    """A step of sequences that have so many rows in the cache already."""
    manifest, batch = read_manifest(bundle), len(starts)
    model, random = manifest.model, np.random.default_rng(1)
    cache = (batch, model.attentions()[0].kv_heads, CAPACITY, model.attentions()[0].dim)
    feed: dict[str, Any] = {
        io_spec.INPUTS_EMBEDS: random.standard_normal((batch, tokens, model.hidden_size)) / 4,
        io_spec.POSITION_IDS: np.array(starts)[:, None] + np.arange(tokens),
        io_spec.DIALECTS[manifest.dialect].cursor: np.array(starts),
        io_spec.KV_POSITIONS: np.arange(rows),
        io_spec.LOGITS_INDICES: np.arange(tokens)[None].repeat(batch, 0),
    }
    for name in cache_tensors(model, "fp16"):
        feed[io_spec.PAST_PREFIX + name] = random.standard_normal(cache)
    return {
        name: value.astype(np.float16) if value.dtype == np.float64 else value
        for name, value in feed.items()
    }


def difference(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(np.abs(first.astype(np.float64) - second).max())


def check_same(
    bundle: Path, own: OwnGraph, feed: dict[str, Any], data: bytes | None = None
) -> dict[str, Any]:
    """The answers and the new rows of the cache are those of the graph as exported."""
    graph = data or (bundle / "decoder.onnx").read_bytes()
    before = compute_all(graph, bundle, feed)
    after = compute_all(own.data, own.path.parent, {**feed, **weights_of(own)})
    assert list(after) == list(before)
    for name, values in after.items():
        assert values.dtype == before[name].dtype
        assert difference(values, before[name]) < LOGITS_TOLERANCE, name
    assert np.abs(after[io_spec.LOGITS]).max() > 1
    return after


def plugins_of(own: OwnGraph) -> list[str]:
    return [node.name for node in OnnxFile(own.data).nodes if node.op_type.startswith("attention")]


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize(
    ("starts", "tokens"), [([0], 7), ([0, 0, 0], 3), ([5, 40], 1), ([17, 0], 9)]
)
def test_the_answers_are_those_of_the_graph_as_exported(
    wide: Bundle, tmp_path: Path, dialect: str, starts: list[int], tokens: int
) -> None:
    bundle = wide(dialect)
    own = rewrite(bundle)
    assert own.attentions == ("layers.0.attention", "layers.1.attention")
    assert plugins_of(own) == [
        f"{name}/attention_{part}" for name in own.attentions for part in ("parts", "join")
    ]
    assert {reason for name, reason in own.left.items() if name in own.attentions} == set()
    check_same(bundle, own, feed_of(bundle, starts, tokens))


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_a_layer_without_rope_has_the_same_attention(wide: Bundle, dialect: str) -> None:
    bundle = wide(dialect, kind="smollm3")
    own = rewrite(bundle)
    assert own.attentions == ("layers.0.attention", "layers.1.attention")
    check_same(bundle, own, feed_of(bundle, [17, 0], 9))


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_a_prompt_and_then_tokens_over_its_own_cache(
    wide: Bundle, tmp_path: Path, dialect: str
) -> None:
    """What the plugins wrote is what they read: no random rows here."""
    bundle = wide(dialect)
    own = rewrite(bundle)
    native = dialect == "native"
    feed = feed_of(bundle, [0, 0], 6)
    for name in feed:
        if name.startswith("past_key_values"):
            feed[name] = np.zeros_like(feed[name])
    start = 0
    for tokens in (6, 1, 1, 2):
        step = {**feed_of(bundle, [start, start], tokens), **{
            name: value for name, value in feed.items() if name.startswith("past_key_values")
        }}  # fmt: skip
        found = check_same(bundle, own, step)
        for name in ("0.key", "0.value", "1.key", "1.value"):
            past = io_spec.PAST_PREFIX + name
            if native:
                feed[past] = found[io_spec.PRESENT_PREFIX + name]
            else:
                feed[past][:, :, start : start + tokens] = found[f"new.{name}"]
        start += tokens


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_the_mask_leaves_the_graph_and_the_cache_is_read_as_it_is(
    wide: Bundle, tmp_path: Path, dialect: str
) -> None:
    own = rewrite(wide(dialect))
    graph = OnnxFile(own.data)
    read = {name for node in graph.nodes for name in node.inputs}
    assert io_spec.KV_POSITIONS not in read
    kinds = {node.op_type for node in graph.nodes}
    assert not kinds & {"Attention", "Softmax", "LessOrEqual", "Slice", "Where"}
    assert [value.name for value in graph.inputs] == [
        value.name for value in OnnxFile((wide(dialect) / "decoder.onnx").read_bytes()).inputs
    ]
    (parts,) = (node for node in graph.nodes if node.name == "layers.1.attention/attention_parts")
    cached = io_spec.present_key(1) if dialect == "native" else io_spec.past_key(1)
    assert parts.inputs[1] == cached
    assert parts.inputs[5] == "own_attention.positions"


def test_an_idle_slot_does_not_change_the_others(wide: Bundle, tmp_path: Path) -> None:
    """It has position 0 and writes the last row (`StepBuffers.fill`)."""
    bundle = wide("native")
    own = rewrite(bundle)
    feed = feed_of(bundle, [9, 9], 1)
    alone = compute_all(own.data, own.path.parent, feed)[io_spec.LOGITS]
    feed[io_spec.POSITION_IDS][1] = 0
    feed[io_spec.WRITE_INDICES][1] = CAPACITY - 1
    beside = compute_all(own.data, own.path.parent, feed)[io_spec.LOGITS]
    assert_array_equal(beside[0], alone[0])
    assert np.isfinite(beside).all()


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("kv_read", ["slice", "full"])
def test_the_graph_of_an_engine_with_other_options(
    wide: Bundle, tmp_path: Path, dialect: str, kv_read: Any
) -> None:
    bundle = wide(dialect, "int4")
    config = BuildConfig(
        bundle, max_prefill=16, kv_capacity=CAPACITY, kv_read=kv_read, kernels="own"
    )
    data = graph_of(plan_build(config, read_manifest(bundle)))
    own = rewrite(bundle, data)
    assert len(own.linears) == 9
    assert len(own.attentions) == 2
    assert own.left == {}
    check_same(bundle, own, feed_of(bundle, [6, 0], 2), data)


def test_the_nodes_of_the_kind_that_python_launches_say_how_wide_heads_are(
    wide: Bundle, tmp_path: Path
) -> None:
    bundle = wide("portable")
    kinds: tuple[Any, ...] = ("compiled", "python")
    owns = [rewrite(bundle, plugins=kind) for kind in kinds]
    assert owns[0].plugins == owns[1].plugins == {("attention_parts", 64), ("attention_join", 64)}
    nodes = [[node for node in OnnxFile(own.data).nodes if node.domain] for own in owns]
    assert len(nodes[0]) == 4
    for compiled, python in zip(*nodes, strict=True):
        assert (python.op_type, python.inputs, python.outputs, python.name) == (
            *(compiled.op_type, compiled.inputs, compiled.outputs, compiled.name),
        )
        assert node_attributes(python) == {
            "plugin_namespace": "edge_llm",
            "plugin_version": "v3",
            "width": 64,
        }
    check_same(bundle, owns[1], feed_of(bundle, [5, 40], 2))


@pytest.mark.parametrize(
    ("dialect", "plugins", "version"),
    [("native", "compiled", "1"), ("portable", "compiled", "1"), ("portable", "python", "v3")],
)
def test_nvidias_own_parser_wants_the_plugins_and_nothing_else(
    wide: Bundle, tmp_path: Path, dialect: str, plugins: str, version: str
) -> None:
    """TensorRT for RTX has no plugins, but the parser of all: it reads the rest of the graph."""
    pytest.importorskip("tensorrt_rtx")
    own = rewrite(wide(dialect), plugins=plugins)
    lines: list[str] = []
    compiler = Compiler(compat.load("tensorrt-rtx"), lambda _level, text: lines.append(text))
    with pytest.raises(BuildError, match=r"attention_parts: .*Plugin not found.*\(3 more such"):
        compiler.parse(own.data, own.path, "slice")
    for name in ("attention_parts", "attention_join"):
        wanted = f"pluginName: {name}, pluginVersion: {version}, pluginNamespace: edge_llm"
        assert sum(line.startswith("Plugin not found") and wanted in line for line in lines) == 2


def test_attention_is_left_alone_unless_asked_for(wide: Bundle, tmp_path: Path) -> None:
    bundle = wide("native", "int4")
    data = (bundle / "decoder.onnx").read_bytes()
    own = use_own_kernels(data, read_manifest(bundle), bundle)
    assert own.attentions == ()
    assert "Attention" in {node.op_type for node in OnnxFile(own.data).nodes}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quant": "bf16"}, "its floats are bf16, and the kernels take FP16"),
        ({"width": 32}, "its heads have 32 values, and the kernels take 64 or 128"),
        ({"kv_cache": "int8"}, "its cache is INT8, and the kernels take FP16"),
    ],
)
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_unsupported_parts_are_named(
    wide: Bundle, tmp_path: Path, dialect: str, options: dict[str, Any], reason: str
) -> None:
    bundle = wide(dialect, **options)
    manifest = read_manifest(bundle)
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    found, left = use_own_attention(graph, manifest)
    if manifest.int8_layers and len(manifest.int8_layers) < 2:
        assert found
    else:
        assert found == {}
        with pytest.raises(BuildError, match=f"no attention of .*{reason}.*leave --attention own"):
            rewrite(bundle)
    assert set(left.values()) == {reason}


def _nodes(graph: OnnxFile, op_type: str) -> list[Node]:
    return [node for node in graph.nodes if node.op_type == op_type]


@pytest.mark.parametrize(
    ("dialect", "change", "reason"),
    [
        ("native", lambda g: put(_nodes(g, "Attention")[0], scale=0.5), "root of the width"),
        ("native", lambda g: put(_nodes(g, "Attention")[0], softcap=30.0), "has more to it"),
        ("native", lambda g: put(_nodes(g, "Attention")[0], is_causal=1), "has more to it"),
        ("native", lambda g: _nodes(g, "Attention")[0].inputs.pop(), "has more to it"),
        ("native", lambda g: _nodes(g, "LessOrEqual")[0].inputs.reverse(), "not the causal one"),
        ("native", lambda g: put(_nodes(g, "TensorScatter")[0], axis=1), "around present.0.key"),
        ("portable", lambda g: _nodes(g, "Where")[0].inputs.reverse(), "around mask.past"),
        ("portable", lambda g: _nodes(g, "LessOrEqual")[0].inputs.reverse(), "around position_ids"),
        ("portable", lambda g: put(_nodes(g, "Softmax")[0], axis=-2), "around layers.0.softmax"),
        ("portable", lambda g: _nodes(g, "Concat")[-1].inputs.reverse(), "the nodes around"),
    ],
)
def test_an_unknown_graph_is_left_alone(
    wide: Bundle, dialect: str, change: Callable[[OnnxFile], Any], reason: str
) -> None:
    bundle = wide(dialect)
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    change(graph)
    _, left = use_own_attention(graph, read_manifest(bundle))
    assert left
    assert all(reason in each for each in left.values()), left


def test_a_result_that_something_else_reads_is_left(wide: Bundle) -> None:
    bundle = wide("native")
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    (reader,) = (node for node in graph.nodes if "layers.0.gate_up.out" in node.inputs)
    reader.inputs.append("layers.1.attended")
    found, left = use_own_attention(graph, read_manifest(bundle))
    assert found == {"layers.0.attention": 64}
    assert "layers.1.attended" in left["layers.1.attention"]


def test_other_numbers_of_heads_than_the_manifests_are_seen(wide: Bundle) -> None:
    bundle = wide("portable")
    manifest = read_manifest(bundle)
    model = change_model(manifest.model, num_heads=8)
    graph = OnnxFile((bundle / "decoder.onnx").read_bytes())
    found, left = use_own_attention(graph, msgspec.structs.replace(manifest, model=model))
    assert found == {}
    assert len(left) == 2
