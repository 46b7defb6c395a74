"""``build --tune`` on the stand-ins: every variant is tried, the fastest that is right is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.engine_file import find_engines, read_engine_info, rebuild_command
from edge.bundle.engine_records import RECORDS_VARIABLE, built_here
from edge.bundle.manifest import read_manifest
from edge.bundle.trust import KEYS_VARIABLE
from edge.device.gpu import Gpu
from edge.errors import BuildError, ConfigError, ResourceError
from edge_fleet.signing import sign_bundle
from edge_lab.cli.inspect import inspect
from edge_lab.measure import bench
from edge_lab.measure.bench import Samples
from edge_lab.measure.verify import compare_backends, default_thresholds
from engines.build_plan import BuildPlan, plan_build
from engines.builder import build as build_module
from engines.builder import tune
from engines.builder.audit import Audit
from engines.builder.build import build_engine
from engines.builder.store import EngineStore
from engines.builder.target import Target
from engines.builder.variant import Compiled
from engines.cli import build
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from tests.conftest import RUNNABLE, Bundles, PoolingBundles
from tests.makers.keys import make_key
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied, fake_plan, install, make_module, write_engine

pytestmark = pytest.mark.skipif(
    RUNNABLE != "native", reason="needs ONNX Runtime >= 1.26 for dialect native"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu()
    install(monkeypatch, device)
    device.push()  # the build reads the layers, for which TensorRT takes the primary context
    with emptied(device):
        yield device
        device.pop()


class Variants:
    """A compiler without TensorRT: what it builds, refuses and spoils is planted, by variant."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
        self.seconds: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.wrong: set[str] = set()
        self.seen_timings: list[bytes | None] = []
        self.plans: list[weakref.ref[Any]] = []
        self.plans_alive: list[int] = []  # whenever a variant is compiled or measured
        rt = TensorRT(make_module(gpu), "tensorrt", "10.16.2.10")
        self.target = Target(rt, Gpu("Orin", "8.7"), "8.7")
        monkeypatch.setattr(build_module, "find_target", lambda **_options: self.target)
        monkeypatch.setattr(tune, "make_rungs", self.rungs)
        monkeypatch.setattr(tune, "compile_bundle", self.compile)
        measure = tune.measure

        def planted(rung: BuildPlan, directory: Path, progress: Any) -> Any:
            self.count_plans()
            seconds, problem, _ = measure(rung, directory, progress)  # it runs, whatever it says
            assert (seconds or 0) > 0
            assert problem is None
            name = self.name(rung)
            if name in self.wrong:
                return None, "least cosine 0.31"
            return self.seconds[name], None

        monkeypatch.setattr(tune, "measure", planted)

    def rungs(self, asked: BuildPlan, _rt: TensorRT) -> list[BuildPlan]:
        """More of them than a build of this version leaves open (`test_fallbacks`)."""
        config = asked.config
        reads: list[Any] = ["slice", "full"] if config.kv_read == "auto" else [asked.kv_read]
        attentions: list[Any] = ["fused", "decomposed"]
        return [
            plan_build(dataclasses.replace(config, kv_read=read, attention=each), asked.manifest)
            for each in attentions
            for read in reads
        ]

    def name(self, rung: BuildPlan) -> str:
        return f"{rung.kv_read} {rung.attention}"

    def count_plans(self) -> None:
        self.plans_alive.append(sum(plan() is not None for plan in self.plans))

    def compile(self, rung: BuildPlan, _target: Target, **options: Any) -> Compiled:
        name = self.name(rung)
        self.count_plans()
        self.seen_timings.append(options["timings"])
        options["keep_log"](f"info: {name}\n")
        if name in self.refused:
            raise BuildError(self.refused[name])
        plan = np.frombuffer(fake_plan(rung), np.uint8)  # a buffer, as TensorRT's
        self.plans.append(weakref.ref(plan))
        problems = (self.faults[name],) if name in self.faults else ()
        return Compiled(
            plan, len(plan), "10.16.2.10", name.encode(), Audit(problems, (), (), 2), 1.0, None
        )


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> Variants:
    return Variants(monkeypatch, gpu)


def run(bundle: Path, *arguments: str) -> Any:
    line = [str(bundle), "--max-prefill", "32", "--tune", *arguments]
    return CliRunner().invoke(build, line, catch_exceptions=False)


def test_the_fastest_correct_variant_is_kept(bundle: Path, variants: Variants) -> None:
    variants.seconds = {"slice fused": 0.004, "slice decomposed": 0.003, "full decomposed": 0.005}
    variants.refused = {"full fused": "no such kernel"}
    result = json.loads(run(bundle, "--kv-read", "auto", "--json").stdout)
    assert (result["kv_read"], result["attention"]) == ("slice", "decomposed")
    (directory,) = find_engines(bundle)
    info = read_engine_info(directory)
    assert [(each.kv_read, each.attention, each.decode_s) for each in info.tuned] == [
        ("slice", "fused", 0.004),
        ("slice", "decomposed", 0.003),
        ("full", "decomposed", 0.005),
    ]
    assert [each.reason for each in info.refused] == ["no such kernel"]
    assert rebuild_command(directory, info).endswith(
        "--kv-read auto --attention auto --tune --workspace 1073741824 --opt-level 3 "
        "--kernels tensorrt"
    )
    assert not list((bundle / "engines").glob(".tune-*"))
    assert (directory / "build.log").read_text().count("== attention") == 4
    assert variants.seen_timings[0] is None  # each build extends the timings of the one before
    assert variants.seen_timings[-1] == b"slice decomposed"
    assert (directory / "timing.cache").read_bytes() == b"full decomposed"
    with TensorRTBackendOf(bundle) as engine:
        assert engine.info == info
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "tried slice, decomposed" in shown
    assert "3.00 ms per decode step" in shown
    assert "is up to date" in run(bundle, "--kv-read", "auto").stdout


class TensorRTBackendOf:
    """The engine that a bundle's reader takes."""

    def __init__(self, bundle: Path) -> None:
        self.engine = TensorRTBackend(bundle, read_manifest(bundle))

    def __enter__(self) -> TensorRTBackend:
        return self.engine

    def __exit__(self, *_error: object) -> None:
        self.engine.close()


@pytest.mark.slow
def test_a_fast_variant_that_answers_wrong_is_not_kept(bundle: Path, variants: Variants) -> None:
    variants.seconds = {"slice decomposed": 0.009}
    variants.wrong = {"slice fused"}
    text = run(bundle).stdout
    assert "tried: attention fused, cache read as slice: least cosine 0.31" in text
    assert "tried: attention decomposed, cache read as slice: 9.00 ms per decode step" in text
    assert text.rstrip().endswith("taken: attention decomposed, cache read as slice")


def test_a_network_that_fails_the_audit_is_not_even_run(bundle: Path, variants: Variants) -> None:
    variants.faults = {"slice fused": "attention x is causal"}
    variants.seconds = {"slice decomposed": 0.009}
    result = json.loads(run(bundle, "--json").stdout)
    assert result["tuned"][0]["problem"] == "attention x is causal"
    assert result["attention"] == "decomposed"


def test_if_no_variant_is_right_the_old_engine_stays_and_all_reasons_are_told(
    bundle: Path, variants: Variants
) -> None:
    variants.seconds = {"slice fused": 0.004, "slice decomposed": 0.003}
    run(bundle)
    before = read_engine_info(find_engines(bundle)[0])
    variants.wrong = {"slice fused"}
    variants.refused = {"slice decomposed": "out of memory"}
    with pytest.raises(BuildError, match=r"slice: out of memory; .*slice: least cosine 0\.31"):
        run(bundle, "--opt-level", "4")
    assert read_engine_info(find_engines(bundle)[0]) == before
    assert not list((bundle / "engines").glob(".tune-*"))


def test_a_full_disk_costs_one_variant(
    bundle: Path, variants: Variants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the one that is tried only the fastest so far takes room."""
    variants.seconds = {"slice fused": 0.003, "slice decomposed": 0.004, "full fused": 0.002}
    commit = EngineStore.commit
    beside: list[list[str]] = []

    def limited(store: EngineStore, *args: Any) -> Any:
        here = store.directory.name
        beside.append(sorted(each.name for each in (bundle / "engines").glob(".tune-*")))
        if here == ".tune-3":
            raise ResourceError("the disk filled up")
        return commit(store, *args)

    monkeypatch.setattr(EngineStore, "commit", limited)
    result = json.loads(run(bundle, "--kv-read", "auto", "--json").stdout)
    assert (result["kv_read"], result["attention"]) == ("full", "fused")
    assert [each["problem"] for each in result["tuned"]] == [None, None, None, "the disk filled up"]
    assert beside == [[], [".tune-0"], [".tune-1"], [".tune-1"], []]


@pytest.mark.slow
def test_a_plan_in_its_file_is_not_kept_in_memory(bundle: Path, variants: Variants) -> None:
    """A Jetson has no room for it beside the loaded engine, or the builder of the next one."""
    variants.seconds = {"slice decomposed": 0.004, "full fused": 0.002, "full decomposed": 0.003}
    variants.faults = {"slice fused": "attention x is causal"}
    run(bundle, "--kv-read", "auto")
    assert variants.plans_alive == [0] * (4 + 3)


@pytest.mark.parametrize("name", [".tune-0", ".trtexec-x", ".kernels-x"])
def test_any_build_removes_what_a_killed_one_left(
    name: str, bundle: Path, gpu: FakeGpu, variants: Variants
) -> None:
    left = bundle / "engines" / name
    left.mkdir(parents=True)
    (left / "engine.plan").write_bytes(bytes(9))
    assert build_engine(BuildConfig(bundle, max_prefill=32), target=variants.target).built
    assert not left.exists()


def test_an_engine_is_compared_and_timed(bundle: Path, gpu: FakeGpu, tiny_bundles: Bundles) -> None:
    """The measurement itself, on a right engine and on one with other weights."""

    def plan_of(path: Path) -> BuildPlan:
        return plan_build(BuildConfig(path, max_prefill=32), read_manifest(path))

    directory = write_engine(bundle, max_prefill=32)
    seconds, problem, _ = tune.measure(plan_of(bundle), directory)
    assert problem is None
    assert seconds is not None
    assert 0 < seconds < 10
    info = read_engine_info(directory)
    EngineStore(bundle, directory.name).commit(
        fake_plan(plan_of(tiny_bundles("qwen2", "native", "fp16"))),
        lambda name, num_bytes, sha256: msgspec.structs.replace(
            info, plan=name, plan_bytes=num_bytes, plan_sha256=sha256
        ),
    )
    seconds, problem, _ = tune.measure(plan_of(bundle), directory)
    assert seconds is None
    assert problem is not None
    assert "cosine" in problem


def test_an_engine_of_a_small_cache_is_compared_and_timed_too(bundle: Path, gpu: FakeGpu) -> None:
    """The prompts leave room for the tokens after them."""
    config = BuildConfig(bundle, max_prefill=32, kv_capacity=64)
    directory = write_engine(bundle, max_prefill=32, kv_capacity=64)
    seconds, problem, _ = tune.measure(plan_build(config, read_manifest(bundle)), directory)
    assert problem is None
    assert seconds is not None


def test_one_lucky_step_decides_nothing(
    bundle: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_bench(*args: Any, **options: Any) -> Samples:
        samples = bench.run_bench(*args, **options)
        samples.itl_s[:] = [[0.03, 0.001, 0.04], [0.03, 0.9, 0.02]]
        samples.prefill_s[:] = [0.2, 0.01, 0.5]
        return samples

    monkeypatch.setattr(tune, "run_bench", run_bench)
    directory = write_engine(bundle, max_prefill=32)
    asked = plan_build(BuildConfig(bundle, max_prefill=32), read_manifest(bundle))
    assert tune.measure(asked, directory) == (0.03, None, 0.2)


def test_an_engine_is_held_to_what_verify_asks_for(
    tiny_bundles: Bundles, tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_bundles("qwen2", "portable", "fp16", "int8")
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    directory = write_engine(bundle, max_prefill=32)
    asked: list[Any] = []

    def compare(*backends: Any, thresholds: Any = None, **options: Any) -> Any:
        asked.append(thresholds)
        return compare_backends(*backends, thresholds=thresholds, **options)

    monkeypatch.setattr(tune, "compare_backends", compare)
    manifest = read_manifest(bundle)
    tune.measure(plan_build(BuildConfig(bundle, max_prefill=32), manifest), directory)
    assert asked == [default_thresholds(manifest, rounds=False)]
    assert asked[0].cache_cosine < 0.999


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_bundle_that_decodes_nothing_is_refused_before_anything_is_compiled(
    task: Any, pooling_bundles: PoolingBundles, variants: Variants
) -> None:
    with pytest.raises(ConfigError, match=f"--tune times decode steps, .* to {task}; leave"):
        run(pooling_bundles(task, "native", "int4"))
    assert variants.seen_timings == []


def test_tune_is_never_ignored(bundle: Path, variants: Variants) -> None:
    variants.seconds = {"slice fused": 0.004, "slice decomposed": 0.003}
    built = build_engine(BuildConfig(bundle, max_prefill=32, tune=True), target=variants.target)
    assert [each.decode_s for each in built.info.tuned] == [0.004, 0.003]
    with pytest.raises(ConfigError, match="--tune needs the Python API"):
        run(bundle, "--print-trtexec", "--trt", "10.16")


def test_variants_are_tried_where_keys_are_trusted(
    bundle: Path, variants: Variants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in no record: what this process has built, it may load."""
    key, keys, records = make_key(), tmp_path / "trusted-keys", tmp_path / "records"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    sign_bundle(bundle, key, "the vendor's")
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    monkeypatch.setenv(RECORDS_VARIABLE, str(records))
    variants.seconds = {"slice fused": 0.004, "slice decomposed": 0.003}
    assert json.loads(run(bundle, "--json").stdout)["attention"] == "decomposed"
    (directory,) = find_engines(bundle)
    built_here.clear()
    read_engine_info(directory, keys)
    assert len(list(records.iterdir())) == 2  # of the engine and of its timings
