"""Predictions from what is in a built engine."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge.backends.tensorrt.device_memory import plan_engine_memory
from edge.bundle.engine_file import ENGINE_JSON, find_engines, read_engine_info
from edge.bundle.manifest import read_manifest
from edge.errors import BundleError, ConfigError
from edge_lab.cli.plan import plan
from edge_lab.planner.devices import MODULES
from edge_lab.planner.engine import Asked, PlannedEngine, find_engine
from edge_lab.planner.speed import (
    FITTED,
    LAUNCHES_PER_LAYER,
    EngineStep,
    EngineWork,
    Measured,
    Work,
    calibrate,
    ceiling,
    decode_s,
    predict,
    prefill_s,
    verify_s,
)
from edge_make.engine_layers import layers_path, parse_inspector, read_layers
from tests.conftest import Bundles
from tests.edge_lab.planner.test_speed import work_for
from tests.standins.inspector import inspector_json
from tests.standins.tensorrt import write_engine

AGX = MODULES["agx-orin-64"].mode(None)
KINDS = ("prefill", "decode")
Build = Callable[..., Path]


@pytest.fixture
def build(tiny_bundles: Bundles, tmp_path: Path) -> Build:
    """Makes a bundle with an engine whose table of layers is that of the given inspector."""

    def make(quant: str = "int4", *, table: dict[str, Any] | None = None, **options: Any) -> Path:
        bundle = tmp_path / "bundle"
        if not bundle.exists():
            shutil.copytree(tiny_bundles("qwen2", "native", quant), bundle)
        directory = write_engine(bundle, **{"max_prefill": 32, **options})
        found = parse_inspector([inspector_json(read_manifest(bundle), **(table or {}))], KINDS)
        path = layers_path(directory / read_engine_info(directory).plan)
        path.write_bytes(msgspec.json.encode(found))
        return bundle

    return make


def planned(bundle: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(plan, [str(bundle), *arguments, "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def find(bundle: Path, **asked: Any) -> PlannedEngine:
    found = find_engine(bundle, read_manifest(bundle), Asked(**asked))
    assert isinstance(found, PlannedEngine), found
    return found


def test_launches_are_the_layers_of_the_table(build: Build):
    bundle = build()
    found = planned(bundle)
    (directory,) = (bundle / "engines").iterdir()
    info = read_engine_info(directory)
    table = read_layers(directory / info.plan)
    assert table is not None
    steps = found["options"][0]["work"]["engine"]
    assert {kind: steps[kind]["launches"] for kind in KINDS} == {
        kind: len(table.of(kind)) for kind in KINDS
    }
    assert found["engine"] == {
        "name": "engine",
        "plan": info.plan,
        "plan_bytes": info.plan_bytes,
        "max_batch": 1,
        "max_prefill": 32,
        "kv_capacity": info.kv_capacity,
        "kv_read": info.kv_read,
    }
    assert found["engine_unknown"] is None
    assert (found["kv_capacity"], found["max_prefill"]) == (info.kv_capacity, 32)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_an_unpacked_weight_adds_its_bytes_and_nothing_else(quant: str, build: Build):
    """Written and read in 16 bits; of two planes both."""
    plain = find(build(quant)).work
    bundle = build(quant, table={"unpacked": ("layers.1.down",)})
    found = find(bundle).work
    linear = read_manifest(bundle).quantization.linears["layers.1.down"]
    for step, before in ((found.decode, plain.decode), (found.prefill, plain.prefill)):
        assert step is not None
        assert before is not None
        assert (before.unpacked_weights, before.unpacked_bytes) == (0, 0)
        assert (step.unpacked_weights, step.unpacked_bytes) == (1, 4 * math.prod(linear.shape))
        assert step.launches == before.launches + 1  # the kernel that unpacks
    work = work_for("deepseek-r1:1.5b", "int4")
    times = [
        decode_s(dataclasses.replace(work, engine=each), AGX, FITTED, 1, 64)
        for each in (plain, found)
    ]
    more_s = 4 * math.prod(linear.shape) / (AGX.bytes_per_s * FITTED.weights)
    assert times[1] - times[0] == pytest.approx(more_s + FITTED.launch_s)


def test_a_built_engine_takes_the_bytes_of_its_plan(build: Build):
    """As the runtime counts it, which may be more than the weights once."""
    bundle = build()
    (directory,) = find_engines(bundle)
    info = read_engine_info(directory)
    size = ["--kv-capacity", str(info.kv_capacity), "--max-prefill", "32"]
    ruled, found = (
        planned(bundle, *size, *options)["options"][0]["memory"]
        for options in (["--no-engine"], [])
    )
    allocated = plan_engine_memory(info, read_manifest(bundle)).weights_bytes
    extra = found["plan_extra_bytes"]
    assert found["weights_bytes"] + extra == allocated == info.plan_bytes
    assert extra != ruled["plan_extra_bytes"] == 0
    for total in ("device_bytes", "process_bytes", "load_peak_bytes"):
        assert found[total] - ruled[total] == extra


def test_both_planes_of_a_weight_count(build: Build):
    bundle = build("int8")
    manifest = read_manifest(bundle)
    assert manifest.quantization.linears["lm_head"].scheme.planes
    (directory,) = (bundle / "engines").iterdir()
    path = layers_path(directory / read_engine_info(directory).plan)
    table = read_layers(directory / read_engine_info(directory).plan)
    assert table is not None
    kernels = tuple(
        msgspec.structs.replace(
            table.of("decode")[0],
            name=f"unpack_{node}",
            kind="kgen",
            reads=("int4", "fp16"),
            writes=("fp16",),
            # One node may be in two layers; its weight is written once.
            nodes=(f"lm_head.{node}/DequantizeLinear",),
        )
        for node in ("dequantized", "high_dequantized", "high_dequantized")
    )
    changed = msgspec.structs.replace(table, layers=table.layers + kernels)
    path.write_bytes(msgspec.json.encode(changed))
    step = find(bundle).work.decode
    assert step is not None
    size = math.prod(manifest.quantization.linears["lm_head"].shape)
    assert (step.unpacked_weights, step.unpacked_bytes) == (2, 2 * 4 * size)


def test_rows_of_an_8_bit_cache_are_no_weights(build: Build):
    (directory,) = (build() / "engines").iterdir()
    table = read_layers(directory / read_engine_info(directory).plan)
    assert table is not None
    node = "present.0.key.read.integers/DequantizeLinear"
    layer = msgspec.structs.replace(table.layers[0], reads=("int8",), nodes=(node,))
    assert not layer.unpacks
    assert msgspec.structs.replace(layer, nodes=("lm_head.dequantized/DequantizeLinear",)).unpacks


def test_the_engine_is_believed_where_the_rule_says_unpacked():
    ruled = dataclasses.replace(work_for("deepseek-r1:1.5b", "int8"), unpacked_bytes=10**9)
    step = EngineStep(28 * LAUNCHES_PER_LAYER, 0, 0, 0, "fused")
    built = dataclasses.replace(ruled, engine=EngineWork(step, None))
    assert built.weights_bytes("decode") == ruled.step_bytes
    assert built.weights_bytes("prefill") == ruled.step_bytes + 10**9  # the table has no prefill
    assert ceiling(built, AGX, 1, 1, 1).step_s < ceiling(ruled, AGX, 1, 1, 1).step_s


def with_launches(work: Work, launches: int, unpacked: int = 0) -> Work:
    step = EngineStep(launches, 1 if unpacked else 0, unpacked, 0, "fused")
    return dataclasses.replace(work, engine=EngineWork(step, step))


def test_as_many_launches_as_assumed_predict_what_is_predicted_without_an_engine():
    work = work_for("deepseek-r1:7b", "int4")
    built = with_launches(work, LAUNCHES_PER_LAYER * work.num_layers)
    for batch in (1, 4):
        assert predict(built, AGX, FITTED, batch, 512, 512) == predict(
            work, AGX, FITTED, batch, 512, 512
        )


@given(
    launches=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    unpacked=st.tuples(st.integers(0, 10**10), st.integers(0, 10**10)),
    batch=st.integers(1, 8),
    context=st.integers(1, 4096),
)
def test_more_launches_or_bytes_never_predict_faster(
    launches: tuple[int, int], unpacked: tuple[int, int], batch: int, context: int
):
    work = work_for("deepseek-r1:1.5b", "int4")
    few, many = (with_launches(work, pick(launches), pick(unpacked)) for pick in (min, max))
    for step_s in (
        lambda each: decode_s(each, AGX, FITTED, batch, context),
        lambda each: prefill_s(each, AGX, FITTED, context, 512),
        lambda each: verify_s(each, AGX, FITTED, batch, 3, context),
    ):
        assert step_s(few) <= step_s(many)
    assert predict(many, AGX, FITTED, batch, context).decode_tps < (
        predict(many, AGX, FITTED, batch, context).decode_ceiling_tps
    )


def test_a_decode_step_reads_whole_buckets(build: Build):
    work = dataclasses.replace(
        work_for("deepseek-r1:1.5b", "int4"), engine=EngineWork(None, None, (256, 1024))
    )
    assert [work.rows_read(rows) for rows in (1, 256, 257, 1024)] == [256, 256, 1024, 1024]
    assert decode_s(work, AGX, FITTED, 1, 257) == decode_s(work, AGX, FITTED, 1, 1024)
    assert find(build(kv_read="full")).work.kv_buckets == (128,)
    assert find(build(kv_read="slice", kv_buckets=(64, 128))).work.kv_buckets == (64, 128)
    assert find(build(kv_read="lengths", version="11.4.0.1")).work.kv_buckets == ()


def test_a_calibration_counts_the_launches_of_what_was_measured():
    """Whatever the engines' launches are: predicted again, the measurement comes out."""
    truth = dataclasses.replace(FITTED, weights=0.8, layer_s=150e-6, compute=0.4)
    runs = []
    for quant, launches in (("fp16", 200), ("int8", 500), ("int4", 900)):
        work = with_launches(work_for("deepseek-r1:1.5b", quant), launches)
        tpot_s, seconds = decode_s(work, AGX, truth, 1, 256), prefill_s(work, AGX, truth, 512, 512)
        runs.append(Measured(work, 1, 256, tpot_s, 512, 512, seconds, quant))
    found = calibrate(AGX, FITTED, runs, "measured")
    assert found.launch_s == pytest.approx(150e-6 / LAUNCHES_PER_LAYER)
    assert (found.weights, found.compute) == pytest.approx((0.8, 0.4))


def test_the_json_of_a_work_is_read_back(build: Build):
    bundle = build(table={"unpacked": ("lm_head",), "fused": False})
    work = dataclasses.replace(work_for("deepseek-r1:1.5b", "int4"), engine=find(bundle).work)
    text = json.dumps(dataclasses.asdict(work))
    assert msgspec.convert(json.loads(text), Work) == work
    assert planned(bundle)["options"][0]["work"]["engine"] == json.loads(text)["engine"]


def test_the_table_says_what_it_rests_on(build: Build):
    bundle = build(table={"unpacked": ("lm_head", "layers.0.o"), "fused": False})

    def shown(*arguments: str) -> str:
        done = CliRunner().invoke(
            plan, [str(bundle), *arguments], catch_exceptions=False, env={"COLUMNS": "400"}
        )
        return str(done.stdout)

    step = find(bundle).work.decode
    assert step is not None
    for words in (
        "From the engine engine (engine-",
        f"{step.launches} launches in a decode step, 2 weights unpacked (+",
        "1 of the launches reformats, attention decomposed",
        "81 us per layer (6.7 us per launch)",
    ):
        assert words in shown()
    by_rule = shown("--no-engine")
    assert "predicted by rule (--no-engine was given)" in by_rule
    assert "per launch" not in by_rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "2"), r"--batch 2: .* engine engine has 1; .*--no-engine.*--max-batch 2"),
        (("--kv-capacity", "64"), r"--kv-capacity 64: .* has 128; .*build .*--kv-capacity 64"),
        (("--max-prefill", "33"), r"--max-prefill 33: .* has 32; .*--max-prefill 33"),
    ],
)
def test_an_engine_that_is_too_small_is_refused(
    arguments: tuple[str, ...], message: str, build: Build
):
    bundle = build()
    with pytest.raises(ConfigError, match=message):
        planned(bundle, *arguments)
    assert planned(bundle, *arguments, "--no-engine")["engine"] is None


def test_the_engine_is_the_one_that_would_run(build: Build):
    bundle = build(name="small")
    build(name="large", max_batch=4)
    build(name="short", kv_capacity=64)
    assert find(bundle).name == "small"
    assert find(bundle, batch=3).name == "large"
    assert find(bundle, kv_capacity=64).name == "short"
    with pytest.raises(ConfigError, match="--batch 5: the bundle's engine large has 4"):
        find(bundle, batch=5)


def test_without_a_table_the_prediction_is_the_rule_and_says_why(build: Build):
    bundle = build()
    ruled = planned(bundle, "--no-engine")
    assert ruled["engine_unknown"] == "--no-engine was given"
    (directory,) = (bundle / "engines").iterdir()
    path = layers_path(directory / read_engine_info(directory).plan)
    table = read_layers(directory / read_engine_info(directory).plan)
    assert table is not None

    def same(why: str, *arguments: str) -> None:
        found = planned(bundle, *arguments)
        assert found["options"] == ruled["options"]
        assert why in found["engine_unknown"]

    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(table, layers=())))
    same("has no table of its layers")
    path.unlink()
    same("has no table of its layers")
    planned(bundle, "--batch", "4")  # what is not known does not refuse
    info = read_engine_info(directory)
    (directory / ENGINE_JSON).write_bytes(
        msgspec.json.encode(msgspec.structs.replace(info, compute_capability="8.6"))
    )
    same("another GPU (sm 8.6, here sm 8.7)")
    shutil.rmtree(bundle / "engines")
    same("the bundle has no engine")
    assert planned(Path("deepseek-r1:1.5b"))["engine_unknown"] is None


def test_a_table_of_the_first_profile_alone_leaves_decode_to_the_rule(build: Build):
    bundle = build(table={"profiles": (0,)})
    found, ruled = planned(bundle), planned(bundle, "--no-engine")
    assert found["options"][0]["work"]["engine"]["decode"] is None
    (ours,), (theirs,) = (each["options"][0]["speeds"][:1] for each in (found, ruled))
    assert ours["prefill_s"] != theirs["prefill_s"]


def test_a_table_of_another_bundle_is_refused(build: Build):
    bundle = build()
    (directory,) = (bundle / "engines").iterdir()
    path = layers_path(directory / read_engine_info(directory).plan)
    text = inspector_json(read_manifest(bundle), unpacked=("layers.0.down",))
    table = parse_inspector([text.replace("layers.0.", "layers.9.")], KINDS)
    path.write_bytes(msgspec.json.encode(table))
    with pytest.raises(BundleError, match=r"a weight of layers\.9\.down"):
        find_engine(bundle, read_manifest(bundle), Asked())


def test_no_engine_is_only_for_a_bundle_on_an_orin(build: Build):
    for arguments in (("deepseek-r1:1.5b",), (str(build()), "--device", "cpu")):
        with pytest.raises(ConfigError, match="--no-engine is for a bundle on an Orin"):
            CliRunner().invoke(plan, [*arguments, "--no-engine"], catch_exceptions=False)
