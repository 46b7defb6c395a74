"""What a step reads by graph, manifest and dimensions, and the ceilings that follow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.onnx_file import OnnxFile, attribute
from edge.bundle.weights import manifest_linears, weight_parts
from edge.errors import BundleError
from edge_lab.planner.devices import MODULES
from edge_lab.planner.memory import Deployment, plan_process_memory
from edge_lab.planner.models import find_model
from edge_lab.planner.plan import find_device, make_plan
from edge_lab.planner.speed import FITTED, Work, ceiling, work_of
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from edge_make.recipe import Recipe, recipe_linears
from engines.check.check import check_bundle
from engines.check.step_bytes import read_graph_bytes, step_costs, work_of_graph
from engines.cli import check
from engines.config import BuildConfig, resolve
from engines.rules.facts import GraphFacts
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import FEW_TOKENS, Bundles
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint
from tests.makers.tiny_models import write_checkpoint

Export = Callable[..., Path]
QUICK: dict[str, Any] = {"method": "rtn", "clip": "absmax"}
CALIBRATED: dict[str, Any] = {"calibration_tokens": FEW_TOKENS}
SCHEMES: tuple[tuple[Recipe, dict[str, Any]], ...] = (
    (Recipe("fp16"), {}),
    (Recipe("bf16"), {}),
    (Recipe("int8"), {}),
    (Recipe("int8", 32), {}),
    *((Recipe("int4", size), QUICK) for size in (None, 32, 64, 128)),
    (Recipe("int4", keep=(("lm_head", "float"),)), QUICK),
    (Recipe("int4", keep=(("lm_head", "int4"),)), QUICK),
    (Recipe("int8-w8a8"), CALIBRATED),
    (Recipe("int8-w8a8", keep=(("*", "w8a8"),)), CALIBRATED),
    (Recipe("int4", 64, (("*.down", "int8"), ("*.o", "float"), ("lm_head", "w8a8"))), CALIBRATED),
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a model that every group size divides."""
    root = tmp_path_factory.mktemp("step-bytes")
    source = write_checkpoint(root / "model", "qwen2", hidden_size=128, intermediate_size=256)

    def make(recipe: Recipe, **options: Any) -> Path:
        output = root / f"{len(list(root.iterdir()))}"
        asked = {"quant": recipe.quant, "group_size": recipe.group_size, "keep": recipe.keep}
        config = {"dialect": "portable", "kv_capacity": 64, **asked, **options}
        export_checkpoint(ExportConfig(source=str(source), output=output, **config))
        return output

    return make


def facts_of(bundle: Path) -> tuple[GraphFacts, Manifest]:
    manifest = read_manifest(bundle)
    return GraphFacts(OnnxFile((bundle / manifest.graphs.decoder).read_bytes()), bundle), manifest


def computed(manifest: Manifest, recipe: Recipe) -> Work:
    model, deployment = manifest.model, Deployment(dialect=manifest.dialect)
    linears = recipe_linears(model, recipe)
    plan = plan_process_memory(model, linears, manifest.rope_positions, deployment)
    return work_of(model, linears, plan.weights, deployment)


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize(("recipe", "options"), SCHEMES)
def test_graph_manifest_and_dimensions_agree(
    recipe: Recipe, options: dict[str, Any], dialect: str, export: Export
) -> None:
    facts, manifest = facts_of(export(recipe, dialect=dialect, **options))
    found = read_graph_bytes(facts)
    positions = manifest.rope_positions
    assert found.parts == weight_parts(manifest.model, manifest_linears(manifest), positions)
    linears = recipe_linears(manifest.model, recipe)
    assert found.parts == weight_parts(manifest.model, linears, positions)
    assert found.unpacked == 0
    assert found.cache_row == io_spec.kv_bytes_per_token(manifest.model, manifest.dtype)
    assert work_of_graph(facts, manifest) == computed(manifest, recipe)


def test_a_bundle_is_planned_by_what_it_holds(tmp_path: Path) -> None:
    """Scales in FP32: its manifest knows of them, a recipe does not."""
    recipe = Recipe("int8-w8a8")
    config = ExportConfig(
        source=str(write_loud_checkpoint(tmp_path / "model", "qwen2", layers=(1,))),
        output=tmp_path / "bundle",
        quant=recipe.quant,
        keep=recipe.keep,
        target="jetpack7",
        kv_capacity=64,
        calibration_tokens=256,
    )
    with loud_by_token():
        export_checkpoint(config)
    facts, manifest = facts_of(config.output)
    work = work_of_graph(facts, manifest)
    device, deployment = find_device("orin-nx-16"), Deployment(kv_capacity=64)
    (option,) = make_plan(find_model(str(config.output)), device, deployment, FITTED).options
    # A plan counts half of the one scale that the inputs of each layer have.
    w8a8 = [each for each in manifest_linears(manifest) if each.scheme.kind == "w8a8"]
    assert work.step_bytes - option.work.step_bytes == 2 * len(w8a8)
    assert manifest.quantization.linears["layers.1.down"].rotation_block
    beside = 2 * sum(each.shape[1] for each in w8a8)
    assert option.work.step_bytes - computed(manifest, recipe).step_bytes == beside > 1000


def unpack_the_head(bundle: Path, target: Path, *, blocked: bool) -> Path:
    """Say that the head's INT8 weight has no INT8 input, as bundles had it, or blocks."""
    shutil.copytree(bundle, target)
    manifest = read_manifest(target)
    path = target / manifest.graphs.decoder
    graph = OnnxFile(path.read_bytes())
    for node in graph.nodes:
        if blocked and node.outputs == ["lm_head.dequantized"]:
            node.attributes = [attribute("axis", 0), attribute("block_size", 128)]
        if not blocked and node.op_type == "MatMul" and "lm_head.dequantized" in node.inputs:
            node.inputs[0] = "final_norm.out"
    path.write_bytes(graph.serialize())
    files = {**manifest.files, path.name: sha256_file(path)}
    (target / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))
    return target


@pytest.mark.parametrize("blocked", [False, True])
def test_an_unpacked_weight_is_written_and_read_again(
    blocked: bool, export: Export, tmp_path: Path
) -> None:
    recipe = Recipe("int8-w8a8", keep=(("*", "w8a8"),))
    bundle = export(recipe, **CALIBRATED)
    before = work_of_graph(*facts_of(bundle))
    after = work_of_graph(*facts_of(unpack_the_head(bundle, tmp_path / "b", blocked=blocked)))
    weights = 128 * 320
    assert before.unpacked_bytes == 0
    assert after.unpacked_bytes == 2 * 2 * weights  # FP16, written and read
    # Without an INT8 input there is no scale of it either.
    assert before.step_bytes - after.step_bytes == (0 if blocked else 2)
    mode = MODULES["agx-orin-64"].mode(None)
    slower = ceiling(after, mode, 1, 1, 1).read_bytes / ceiling(before, mode, 1, 1, 1).read_bytes
    assert slower == pytest.approx(1 + 4 * weights / before.read_bytes(1, 1), rel=0.001)


def test_the_planner_counts_the_same_for_a_weight_of_older_bundles(export: Export) -> None:
    manifest = read_manifest(export(Recipe("int8")))
    linears = [
        each._replace(scheme=replace(each.scheme, planes=False))
        for each in recipe_linears(manifest.model, Recipe("int8"))
    ]
    parts = weight_parts(manifest.model, linears, 64)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    work = work_of(manifest.model, linears, parts, Deployment())
    assert work.unpacked_bytes == 4 * weights
    assert work_of(manifest.model, linears, parts, Deployment("ort-cpu")).unpacked_bytes == 0


def test_a_product_of_no_linear_layer_is_refused(export: Export, tmp_path: Path) -> None:
    facts, _ = facts_of(export(Recipe("fp16")))
    head = facts.nodes[-1].node
    name = head.inputs[1]
    facts.constants._by_name["strange"] = facts.constants._by_name[name]
    head.inputs[1] = "strange"
    with pytest.raises(BundleError, match="multiplies by strange, which belongs to no linear"):
        read_graph_bytes(facts)


def test_steps_are_those_of_the_profiles(export: Export) -> None:
    bundle = export(Recipe("int4"), kv_capacity=256, dialect="native", **QUICK)
    facts, manifest = facts_of(bundle)
    work = work_of_graph(facts, manifest)
    buckets = (64, 128, 256)
    shapes = resolve(BuildConfig(bundle, 4, 100, kv_buckets=buckets), manifest)
    steps = step_costs(work, shapes, "slice")
    assert [(s.profile, s.batch, s.tokens, s.rows) for s in steps] == [
        ("prefill", 1, 100, (128, 256)),
        ("decode", 1, 1, (64, 256)),
        ("decode", 4, 1, (64, 256)),
        ("batch", 4, 25, (64, 256)),
    ]
    one, four = steps[1:3]
    row = io_spec.kv_bytes_per_token(manifest.model, manifest.dtype)
    assert four.cache_bytes == (4 * 64 * row, 4 * 256 * row)
    assert one.packed_bytes == four.packed_bytes == work.step_bytes
    assert four.bytes_per_token[0] == work.step_bytes / 4 + 64 * row
    for step in steps:
        assert len(step.ceilings) == sum(len(module.modes) for module in MODULES.values())
        for found in step.ceilings:
            assert found.short.tokens_per_s > found.full.tokens_per_s
            least = found.full.read_bytes / found.bytes_per_s
            assert found.full.step_s >= least * (1 - 1e-9)
    lengths = step_costs(work, shapes, "lengths")
    assert [step.rows for step in lengths] == [(100, 256), (1, 256), (1, 256), (25, 256)]


@pytest.mark.slow
def test_check_prints_bytes_and_ceilings(
    tiny_bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    reports: list[Any] = []

    def check_once(*arguments: Any) -> Any:
        reports[:] = reports or [check_bundle(*arguments)]
        return reports[0]

    monkeypatch.setattr("engines.check.check.check_bundle", check_once)
    arguments = [str(tiny_bundles("qwen2", "native", "int8")), "--max-batch", "2"]
    arguments += ["--max-prefill", "64"]
    shown = CliRunner().invoke(check, arguments, catch_exceptions=False, env={"COLUMNS": "160"})
    for text in ("Bytes of a step, MB", "decode 1x1", "decode 2x1", "batch 2x32"):
        assert text in shown.stdout
    assert "agx-orin-64 MAXN" in shown.stdout
    told = json.loads(
        CliRunner().invoke(check, [*arguments, "--json"], catch_exceptions=False).stdout
    )
    decode = next(step for step in told["steps"] if step["profile"] == "decode")
    agx = next(each for each in decode["ceilings"] if each["device"] == "orin-nano-8")
    read = decode["packed_bytes"] + decode["cache_bytes"][1]
    assert agx["full"]["read_bytes"] == read
    assert agx["full"]["tokens_per_s"] == pytest.approx(102.4e9 / read)
    assert agx["full"]["bound"] == "bandwidth"
