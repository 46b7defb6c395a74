"""Scratch memory as the compiler reports it: which of it says that weights are unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle import io_spec
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.model.parts import Rope
from edge.model.spec import LayerRun
from engines.build_plan import plan_build
from engines.builder.scratch import (
    DecodeScratch,
    compare_decode_scratch,
    in_floats,
    one_of_each_kind,
    scratch_by_profile,
)
from engines.check.check import check_bundle
from engines.compiler import compat
from engines.config import BuildConfig
from engines.profiles import make_profiles
from engines.rules.facts import GraphFacts
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import FEW_TOKENS, Bundles
from tests.engines.check.test_step_bytes import unpack_the_head
from tests.makers.manifests import make_manifest
from tests.makers.tiny_models import write_checkpoint

WIDTH, VOCABULARY = 256, 40960  # an unpacked head, 21 MB, is more than kernels ever take


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch")
    changes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 768,
        "vocab_size": VOCABULARY,
    }
    return write_checkpoint(folder, "qwen2", num_hidden_layers=3, **changes)


def export(source: Path, output: Path, quant: Any, **options: Any) -> Path:
    config = {"dialect": "native", "kv_capacity": 256, "clip": "absmax", **options}
    if quant == "int4":
        config["method"] = "rtn"
    if quant == "int8-w8a8":
        config["calibration_tokens"] = FEW_TOKENS
    export_checkpoint(ExportConfig(source=str(source), output=output, quant=quant, **config))
    return output


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("quant", ["int4", "int8", "int8-w8a8"])
def test_packed_weights_take_the_scratch_memory_of_floats(
    quant: str, dialect: str, source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = export(source, tmp_path / "bundle", quant, dialect=dialect)
    report = check_bundle(BuildConfig(bundle, max_batch=8, max_prefill=64))
    assert report.passed, report.problems
    found = report.decode_scratch
    assert found is not None
    assert found.packed <= 1.05 * max(found.floats, 16 << 20)


@pytest.mark.slow
@pytest.mark.once
def test_an_unpacked_head_is_refused(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    legal = export(source, tmp_path / "legal", "int8-w8a8", keep=(("*", "w8a8"),))
    planted = unpack_the_head(legal, tmp_path / "planted", blocked=False)
    good, bad = (check_bundle(BuildConfig(each, max_prefill=64)) for each in (legal, planted))
    assert good.passed, good.problems
    (problem,) = bad.problems
    assert "weights are unpacked in every step; export the bundle again" in problem
    found = bad.decode_scratch
    assert found is not None
    assert found.packed - found.floats == pytest.approx(2 * WIDTH * VOCABULARY, rel=0.1)
    decode = next(step for step in bad.steps if step.profile == "decode")
    assert decode.unpacked_bytes == 2 * 2 * WIDTH * VOCABULARY  # what it costs in bytes per token


@pytest.mark.slow
@pytest.mark.once
def test_the_floats_are_those_of_a_float_bundle(source: Path, tmp_path: Path) -> None:
    """Zeros in place of weights, one layer of three, planes joined: the compiler takes the same."""
    pytest.importorskip("tensorrt_rtx")
    floats = export(source, tmp_path / "fp16", "fp16", clip="mse")
    packed = export(source, tmp_path / "int8", "int8")
    whole = check_bundle(BuildConfig(floats, max_prefill=64))
    assert whole.decode_scratch is None  # nothing is packed
    rt = compat.load("tensorrt-rtx")
    build = plan_build(BuildConfig(packed, max_prefill=64), read_manifest(packed))
    found = compare_decode_scratch(build, rt, "8.6")
    assert found is not None
    assert found.floats == pytest.approx(whole.scratch_bytes["decode"], rel=0.002)


@pytest.mark.parametrize(
    ("packed", "floats", "problems"),
    [
        (40_000_000, 40_000_000, 0),
        (42_000_000, 40_000_000, 0),
        (42_000_001, 40_000_000, 1),
        (16_712_192, 1_024, 0),  # two kernels' room
        (18_000_000, 1_024, 1),
    ],
)
def test_five_percent_more_is_a_fault(packed: int, floats: int, problems: int) -> None:
    assert len(DecodeScratch(packed, floats).problems) == problems


def test_a_layer_of_each_kind_is_left(source: Path, tmp_path: Path) -> None:
    keep = (("layers.1.down", "int8"),)
    bundle = export(source, tmp_path / "mixed", "int4", keep=keep, dialect="portable")
    data = (bundle / "decoder.onnx").read_bytes()
    cut = OnnxFile(one_of_each_kind(data, read_manifest(bundle).model))
    names = {info.name for info in (*cut.inputs, *cut.outputs)}
    assert {io_spec.past_key(0), io_spec.past_value(1), io_spec.new_key(1)} < names
    assert not {io_spec.past_key(2), io_spec.new_value(2)} & names
    assert not [node for node in cut.nodes if node.outputs[0].startswith("layers.2.")]
    (last,) = (node for node in cut.nodes if node.outputs == ["last_hidden"])
    assert last.inputs[0] == io_spec.layer_output(1)
    assert one_of_each_kind(cut.serialize(), read_manifest(bundle).model) == cut.serialize()


def test_a_layer_without_rope_is_another_kind(source: Path, tmp_path: Path) -> None:
    bundle = export(source, tmp_path / "alike", "int8", dialect="portable")
    data, model = (bundle / "decoder.onnx").read_bytes(), read_manifest(bundle).model
    (run,) = model.layers
    still = LayerRun(1, tuple(part for part in run.parts if not isinstance(part, Rope)))
    mixed = msgspec.structs.replace(model, layers=(LayerRun(1, run.parts), still) * 2)
    for layers, left in ((model, 1), (mixed, 2)):
        names = {info.name for info in OnnxFile(one_of_each_kind(data, layers)).inputs}
        assert sum(io_spec.past_key(layer) in names for layer in range(3)) == left


def test_nothing_stays_packed(source: Path, tmp_path: Path) -> None:
    bundle = export(source, tmp_path / "mixed", "int8-w8a8")
    twin, num_bytes = in_floats((bundle / "decoder.onnx").read_bytes())
    facts = GraphFacts(OnnxFile(twin))
    assert facts.quant_nodes == []
    products = [node for node in facts.nodes if node.op_type == "MatMul"]
    assert len(products) == 3 * 4 + 1
    for node in products:
        weight = facts.constant(node.input(1))
        assert weight is not None
        assert weight.dtype == "fp16"
        assert weight.location == "zeros"
        assert weight.offset + weight.num_bytes <= num_bytes


def test_profiles_are_reported_in_their_order() -> None:
    manifest = make_manifest(kv_capacity=4096, rope_positions=8192)
    shapes = plan_build(BuildConfig(Path("bundle")), manifest).shapes
    profiles = make_profiles(manifest.model, "native", "fp16", shapes)
    log = [
        "info: Total Activation Memory: 9 bytes",
        "info: Max Scratch Memory: 7 bytes",
        "info: Max Scratch Memory: 5 bytes",
    ]
    assert scratch_by_profile(log, profiles) == {"prefill": 7, "decode": 5}
    assert scratch_by_profile(log[:2], profiles) == {}


@pytest.mark.slow
def test_the_compiler_says_it(tiny_bundles: Bundles) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = tiny_bundles("qwen2", "native", "int4")
    report = check_bundle(BuildConfig(bundle, max_batch=4, max_prefill=64))
    assert report.passed
    assert list(report.scratch_bytes) == ["prefill", "decode", "batch"]
    assert report.scratch_bytes["prefill"] >= report.scratch_bytes["decode"] > 0
