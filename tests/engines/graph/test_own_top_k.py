"""``build --kernels own --best-logits``: the search in two plugins, and what TensorRT keeps."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.testing import assert_array_equal

from edge.backends.best import BestLogits
from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.bundle import io_spec
from edge.bundle.engine_file import read_engine_info
from edge.bundle.manifest import SamplingDefaults, read_manifest
from edge.bundle.onnx_file import Node, OnnxFile
from edge.errors import BuildError
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge_lab.cli.inspect import inspect
from engines.build_plan import plan_build
from engines.builder import variant
from engines.builder.audit import audit_network
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.builder.variant import compile_bundle
from engines.compiler import compat
from engines.compiler.compat import Compiler
from engines.config import BuildConfig
from engines.graph.adapt import graph_of
from engines.graph.own_kernels import use_own_kernels
from engines.graph.own_top_k import KEYS, use_own_top_k
from engines.kernels.reference import top_k_error
from engines.kernels.top_k import MOST_COLUMNS
from tests.conftest import Bundles
from tests.edge.backends.runner import random_ids
from tests.edge.backends.tensorrt.gpu_runner import GpuRunner
from tests.edge.backends.tensorrt.test_best_logits import best_step
from tests.engines.own_builds import gpu, needs_a_runner, only_engine, put, run, target
from tests.makers.manifests import change_model
from tests.standins.cuda import FakeGpu
from tests.standins.own_kernels import compute_all, inputs_of

__all__ = ["gpu", "target"]  # fixtures

BEST = (io_spec.BEST_VALUES, io_spec.BEST_IDS, io_spec.BEST_REST)
DIALECTS = ("portable", "native")


def graph_with_best(bundle: Path, keep: int) -> OnnxFile:
    config = BuildConfig(bundle, max_prefill=16, kv_capacity=64, best_logits=keep)
    return OnnxFile(graph_of(plan_build(config, read_manifest(bundle))))


# The graph


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("keep", [1, 16, 300, 320])
def test_the_best_logits_are_those_of_the_graph_as_exported(
    tiny_bundles: Bundles, dialect: str, keep: int
) -> None:
    bundle = tiny_bundles("qwen2", dialect, "fp16")
    manifest = read_manifest(bundle)
    graph = graph_with_best(bundle, keep)
    before = compute_all(graph.serialize(), bundle, inputs_of(manifest, tokens=5, rows=64))
    assert use_own_top_k(graph, manifest, "compiled") == (keep, "")
    graph.use_domain("edge_llm", 1)
    data = graph.serialize()
    plugins = [node for node in OnnxFile(data).nodes if node.domain == "edge_llm"]
    assert [node.name for node in plugins] == ["top_k/top_k_parts", "top_k/top_k_merge"]
    assert plugins[0].inputs[0] == io_spec.LOGITS
    assert not {"TopK", "Exp"} & {node.op_type for node in OnnxFile(data).nodes}
    after = compute_all(data, bundle, inputs_of(manifest, tokens=5, rows=64))
    assert list(after) == list(before)
    assert_array_equal(after[io_spec.LOGITS], before[io_spec.LOGITS])
    for name in BEST:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
    assert_array_equal(after[io_spec.BEST_VALUES], before[io_spec.BEST_VALUES])
    ids, logits = after[io_spec.BEST_IDS], after[io_spec.LOGITS]
    assert_array_equal(np.take_along_axis(logits, ids, 2), after[io_spec.BEST_VALUES])
    # The reference evaluator has equals in any order; a plugin the first ones, in order.
    wanted = np.argsort(-logits.astype(np.float64), axis=2, kind="stable")[..., :keep]
    assert_array_equal(ids, wanted)
    clear = np.array([[len(set(row)) == row.size for row in rows] for rows in logits])
    assert_array_equal(ids[clear], before[io_spec.BEST_IDS][clear])
    exact = np.exp(logits.astype(np.float64) - logits.max(2, keepdims=True)).sum(2, keepdims=True)
    error = np.abs(after[io_spec.BEST_REST] - before[io_spec.BEST_REST])
    assert (error <= 2.2 * io_spec.sum_error(logits.shape[2]) * exact).all()
    best = BestLogits(
        after[io_spec.BEST_VALUES][0, 0].astype(np.float32),
        ids[0, 0],
        float(after[io_spec.BEST_REST][0, 0, 0]),
        logits.shape[2],
        "fp16",
        lambda: np.empty(0, np.float32),
    )
    others = np.delete(logits[0, 0], ids[0, 0]).astype(np.float64)
    assert np.exp(others - float(logits[0, 0].max())).sum() <= best.rest_bound()


@pytest.mark.parametrize("vocab_size", [2, 320, 7919, 151_936, MOST_COLUMNS])
def test_the_runtime_allows_for_more_than_the_kernels_err(vocab_size: int) -> None:
    """See `BestLogits.rest_bound`."""
    assert top_k_error() < 2.2 * io_spec.sum_error(vocab_size)


@pytest.mark.parametrize(
    ("quant", "changes", "reason"),
    [
        ("bf16", {}, "its floats are bf16, and the kernels take FP16"),
        ("fp16", {"vocab_size": 262_145}, "262,145 logits, .* up to 262,144"),
    ],
)
def test_unsupported_parts_are_named(
    tiny_bundles: Bundles, quant: Any, changes: dict[str, Any], reason: str
) -> None:
    bundle = tiny_bundles("qwen2", "portable", quant)
    manifest = read_manifest(bundle)
    model = change_model(manifest.model, **changes)
    graph = graph_with_best(bundle, 8)
    before = graph.serialize()
    manifest = msgspec.structs.replace(manifest, model=model)
    keep, why = use_own_top_k(graph, manifest, "compiled")
    assert keep == 0
    assert re.search(reason, why)
    assert graph.serialize() == before


def _node(graph: OnnxFile, name: str) -> Node:
    (found,) = (node for node in graph.nodes if name in node.outputs)
    return found


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda g: put(_node(g, "best.fp32"), largest=0), "best.fp32"),
        (lambda g: put(_node(g, "best.fp32"), axis=1), "best.fp32"),
        (lambda g: _node(g, "best.fp32").inputs.__setitem__(1, "best.parts"), "best.fp32"),
        (lambda g: _node(g, "best.row").inputs.__setitem__(0, "final_norm"), "best.fp32"),
        (lambda g: _node(g, "best_ids").inputs.__setitem__(0, "best.fp32"), "best_ids"),
        (lambda g: _node(g, "best_rest").inputs.reverse(), "best.sum"),
        (lambda g: _node(g, "best.greatest").inputs.__setitem__(1, "best.one"), "best.row_sum"),
        (lambda g: _node(g, "best.shifted").inputs.__setitem__(0, "best.row"), "best.sum"),
    ],
)
def test_an_unknown_graph_is_left_alone(
    tiny_bundles: Bundles, change: Callable[[OnnxFile], Any], name: str
) -> None:
    bundle = tiny_bundles("qwen2", "portable", "fp16")
    graph = graph_with_best(bundle, 8)
    change(graph)
    keep, why = use_own_top_k(graph, read_manifest(bundle), "compiled")
    assert keep == 0
    assert why.startswith("the nodes around best")


def test_it_is_not_reported_unless_asked_for(tiny_bundles: Bundles, tmp_path: Path) -> None:
    bundle = tiny_bundles("qwen2", "portable", "int4")
    data = (bundle / "decoder.onnx").read_bytes()
    own = use_own_kernels(data, read_manifest(bundle), bundle)
    assert (own.top_k, own.left) == (False, {})


def test_nvidias_own_parser_wants_the_plugins_and_nothing_else(tiny_bundles: Bundles) -> None:
    """TensorRT for RTX has no plugins, but the parser of all: it reads the rest of the graph."""
    pytest.importorskip("tensorrt_rtx")
    bundle = tiny_bundles("qwen2", "portable", "fp16")
    graph = graph_with_best(bundle, 8)
    assert use_own_top_k(graph, read_manifest(bundle), "compiled") == (8, "")
    graph.use_domain("edge_llm", 1)
    lines: list[str] = []
    compiler = Compiler(compat.load("tensorrt-rtx"), lambda _level, text: lines.append(text))
    with pytest.raises(BuildError, match=r"top_k_parts: .*Plugin not found.*\(1 more such"):
        compiler.parse(graph.serialize(), bundle / "decoder.onnx", "slice")
    for name in ("top_k_parts", "top_k_merge"):
        wanted = f"pluginName: {name}, pluginVersion: 1, pluginNamespace: edge_llm"
        assert sum(line.startswith("Plugin not found") and wanted in line for line in lines) == 1


# The engine, on the stand-ins


@needs_a_runner
def test_an_engine_with_it_says_so(bundle: Path, target: Target) -> None:
    text = run(bundle, "--kernels", "own", "--best-logits", "16").stdout
    assert "own kernels: 9 layers, best logits\n" in text
    directory, info = only_engine(bundle)
    assert (info.own_top_k, info.best_logits, info.left_linears) == (True, 16, {})
    kinds = {each.kind: each.count for each in info.layers}
    assert "topk" not in kinds
    assert sum(each.count for each in info.layers if each.kind == "plugin_v3") == 9 + 2
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "9 linear layers, best logits" in shown
    record = (directory / "engine.json").read_text()
    assert '"own_top_k":true' in record.replace(" ", "")
    without = record.replace('"own_top_k": true', '"own_top_k": false')
    (directory / "engine.json").write_text(without)
    manifest = read_manifest(bundle)
    ours = plan_engine_memory(info, manifest)
    theirs = plan_engine_memory(read_engine_info(directory), manifest)
    assert ours.pinned_bytes == theirs.pinned_bytes
    assert ours.activations_bytes <= theirs.activations_bytes  # no rows in FP32


@needs_a_runner
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.95}, {"top_k": 5}], ids=str
)
def test_answers_are_those_of_whole_rows(
    options: dict[str, Any], bundle: Path, target: Target, gpu: FakeGpu, tmp_path: Path
) -> None:
    plain = Path(shutil.copytree(bundle, tmp_path / "plain"))
    for place, keep in ((bundle, 16), (plain, 0)):
        config = BuildConfig(
            place, max_batch=2, max_prefill=24, kv_capacity=64, kernels="own", best_logits=keep
        )
        assert build_engine(config, target=target).info.own_top_k == bool(keep)
    params = SamplingParams(**options, seed=5).resolve(SamplingDefaults())
    with GpuRunner(bundle, gpu) as ours, GpuRunner(plain, gpu) as theirs:
        vocab = ours.manifest.model.vocab_size
        part, whole = Sampler(params, vocab), Sampler(params, vocab)
        ids = random_ids(1, 4)
        for _ in range(12):
            best = best_step(ours, ids, [1])[0][-1]
            row = theirs.step(ids, [1])[0, -1]
            assert_array_equal(best.values, np.sort(row)[::-1][:16])
            token = part.sample(best)
            assert token == whole.sample(row)
            ids = np.array([[token.id]])


def test_the_audit_holds_for_it(
    tiny_bundles: Bundles, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundles("qwen3", "native", "int4")
    manifest = read_manifest(bundle)
    config = BuildConfig(bundle, max_prefill=32, kernels="own", best_logits=16)
    seen: list[Any] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return audit_network(*arguments)

    monkeypatch.setattr(variant, "audit_network", spy)
    assert compile_bundle(plan_build(config, manifest), target).audit.problems == ()
    (arguments,) = seen
    network, *between, own_top_k, outside = arguments
    assert own_top_k
    layers = {each.name: each for each in network.layers}

    def problems(changed: dict[str, Any], wanted: bool = True) -> list[str]:
        kept = [changed.get(each.name, each) for each in network.layers]
        whole = dataclasses.replace(network, layers=tuple(each for each in kept if each))
        changed_ones = [whole, *between, wanted, outside]
        return list(audit_network(*changed_ones).problems)

    assert problems({}, wanted=False) == ["top_k: a plugin that nobody asked for"] * 2
    parts, merge = layers["top_k/top_k_parts"], layers["top_k/top_k_merge"]
    assert problems({parts.name: None}) == [f"top_k: no plugin makes {KEYS}, top_k.stats"]
    other = dataclasses.replace(parts, inputs=(merge.outputs[0], *parts.inputs[1:]))
    assert problems({parts.name: other}) == [
        "top_k: the plugin that makes top_k.keys does not read logits"
    ]
    fewer = dataclasses.replace(merge, outputs=merge.outputs[:1])
    found = problems({merge.name: fewer})
    assert "top_k: no plugin makes best_values, best_ids, best_rest" in found
    shadow = dataclasses.replace(merge, kind="topk")
    assert "top_k: a search beside that of the plugins" in problems({merge.name: shadow})
