"""``build --kernels`` on the stand-ins: what is built, what is refused, and the audit of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.engine_file import find_engines, read_engine_info, rebuild_command
from edge.bundle.manifest import read_manifest
from edge.errors import BuildError, ConfigError, DependencyError, IntegrityError
from edge_lab import telemetry
from edge_lab.cli.inspect import inspect
from edge_lab.telemetry import Snapshot
from engines import cli
from engines.build_plan import BuildPlan, plan_build
from engines.builder import build as build_module
from engines.builder import tune, variant
from engines.builder.audit import audit_network
from engines.builder.build import build_engine
from engines.builder.fallbacks import describe, make_rungs
from engines.builder.target import Target
from engines.builder.variant import compile_bundle
from engines.compiler import compat, support
from engines.config import BuildConfig
from engines.graph.external_weights import Outside
from engines.kernels.package import Ptx
from tests.conftest import Bundles, PoolingBundles
from tests.engines.own_builds import (
    export,
    gpu,
    needs_a_runner,
    only_engine,
    run,
    target,
    target_of,
)
from tests.makers.tiny_models import write_checkpoint
from tests.standins.cuda import FakeGpu
from tests.standins.network import Planted
from tests.standins.tensorrt import make_module

__all__ = ["gpu", "target"]  # fixtures


@needs_a_runner
def test_an_engine_with_own_kernels_is_kept_beside_the_other(bundle: Path, target: Target) -> None:
    assert "own kernels" not in run(bundle).stdout
    (bundle / "engines" / ".kernels-of-a-killed-build").mkdir()
    text = run(bundle, "--kernels", "own").stdout
    assert "own kernels: 9 layers\n" in text
    assert "left to TensorRT" not in text
    plain, own = find_engines(bundle)[::-1] if "own" in find_engines(bundle)[0].name else (
        find_engines(bundle)
    )  # fmt: skip
    assert own.name == f"{plain.name}-own-kernels"
    infos = read_engine_info(plain), read_engine_info(own)
    assert [info.kernels for info in infos] == ["tensorrt", "own"]
    assert [info.plugins for info in infos] == [None, "compiled"]
    assert infos[1].python_kernels == ()
    assert infos[0].key != infos[1].key
    assert infos[1].own_linears == tuple(read_manifest(bundle).quantization.linears)
    assert infos[1].weights == infos[0].weights
    layers = {each.kind: each.count for each in infos[1].layers}
    assert layers["plugin_v3"] == 9
    assert "dequantize" not in layers
    assert rebuild_command(own, infos[1]).endswith("--kernels own")
    assert rebuild_command(plain, infos[0]).endswith("--kernels tensorrt")
    assert not list((bundle / "engines").glob(".kernels-*"))
    shown = CliRunner().invoke(inspect, [str(own)], catch_exceptions=False).stdout
    assert "own kernels" in shown
    assert "9 linear layers" in shown
    assert "weights as exported yes" in " ".join(shown.split())
    assert "own kernels" not in CliRunner().invoke(inspect, [str(plain)]).stdout
    compiled = {each.profile: each.products for each in infos[1].compiled}
    assert compiled["decode"]["int4"] == 9
    again = json.loads(run(bundle, "--kernels", "own", "--json").stdout)
    assert (again["built"], again["kernels"], len(again["own_linears"])) == (False, "own", 9)


@needs_a_runner
def test_a_build_says_at_once_what_is_slow(
    bundle: Path, target: Target, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "SLOW" not in run(bundle).stdout
    unpacked = ("layers.0.down", "layers.1.down")
    module = make_module(gpu, planted=Planted(no_fused="no such kernel", unpacks=unpacked))
    slow = dataclasses.replace(target, rt=dataclasses.replace(target.rt, module=module))
    monkeypatch.setattr(build_module, "find_target", lambda **_: slow)
    text = run(bundle, "--again").stdout
    assert "SLOW: the engine is slower than it could be: 2 layers unpack their weights" in text
    assert "attention is several kernels" in text
    again = run(bundle)
    assert again.stdout.splitlines()[-1] == text.splitlines()[-1]  # also if it was there already
    directory, info = only_engine(bundle)
    assert [each.unpacking for each in info.compiled] == [2, 2]
    asked = json.loads(run(bundle, "--json").stdout)
    shown = CliRunner().invoke(inspect, [str(directory), "--json"], catch_exceptions=False)
    assert asked["slow"] == json.loads(shown.stdout)["slow"]
    assert len(asked["slow"]) == 2
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False)
    assert shown.stdout.count("SLOW") == 2


@needs_a_runner
def test_it_answers_as_the_graph_on_the_cpu(bundle: Path, target: Target) -> None:
    build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)
    config = BuildConfig(bundle, max_prefill=32, kernels="own")
    rung = plan_build(config, read_manifest(bundle))
    directory, info = only_engine(bundle)
    seconds, problem, _ = tune.measure(rung, directory)
    assert problem is None
    assert (seconds or 0) > 0
    engine = TensorRTBackend(bundle, read_manifest(bundle))
    assert engine.info == info
    engine.close()


@pytest.mark.slow
@needs_a_runner
def test_tuning_builds_both_and_keeps_the_faster(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"own": 0.002, "tensorrt": 0.003}
    wrong: set[str] = set()
    measure = tune.measure

    def planted(rung: BuildPlan, directory: Path, progress: Any) -> Any:
        _, problem, _ = measure(rung, directory, progress)
        assert problem is None
        if rung.kernels in wrong:
            return None, "least cosine 0.31"
        return seconds[rung.kernels], None

    written: list[int] = []
    write = Outside.write

    def count(weights: Outside, target: Any) -> str:
        written.append(weights.num_bytes)
        return write(weights, target)

    monkeypatch.setattr(Outside, "write", count)
    monkeypatch.setattr(tune, "measure", planted)
    result = json.loads(run(bundle, "--kernels", "auto", "--tune", "--json").stdout)
    assert result["kernels"] == "own"
    assert written == [result["outside_bytes"]]  # two variants and the engine share them
    assert not list((bundle / "engines").glob(".tune-*"))
    directory, info = only_engine(bundle)
    assert directory.name.endswith("-auto-kernels")
    assert [(each.kernels, each.attention) for each in info.tuned] == [
        ("tensorrt", "decomposed"),
        ("own", "decomposed"),
    ]
    assert rebuild_command(directory, info).endswith("--kernels auto")
    assert info.tuned[1].label == "slice, decomposed, own kernels"
    shutil.rmtree(directory)
    wrong.add("own")
    text = run(bundle, "--kernels", "auto", "--tune").stdout
    assert (
        "tried: attention decomposed, cache read as slice, own kernels: least cosine 0.31" in text
    )
    assert only_engine(bundle)[1].kernels == "tensorrt"


@needs_a_runner
def test_tuning_continues_if_own_kernels_cannot_be_built(
    tiny_bundles: Bundles,
    tmp_path: Path,
    target: Target,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "measure", lambda *_: (0.001, None))
    bundle = Path(shutil.copytree(tiny_bundles("qwen2", "portable", "int4"), tmp_path / "a"))
    old = dataclasses.replace(target_of(gpu), compute_capability="7.5")
    monkeypatch.setattr(build_module, "find_target", lambda **_: old)
    text = run(bundle, "--kernels", "auto", "--tune").stdout
    assert "own kernels: own kernels need a GPU of compute capability 8.0" in text
    info = only_engine(bundle)[1]
    assert (info.kernels, {each.kernels for each in info.refused}) == ("tensorrt", {"own"})
    floats = Path(shutil.copytree(tiny_bundles("qwen2", "portable"), tmp_path / "b"))
    monkeypatch.setattr(build_module, "find_target", lambda **_: target)
    text = run(floats, "--kernels", "auto", "--tune").stdout
    assert "own kernels: own kernels compute no layer" in text


def test_own_kernels_asked_for_by_name_are_not_skipped(
    bundle: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="own", tune=True)
    rung = plan_build(config, read_manifest(bundle))
    old = target_of(gpu, "10.2.0.19")
    monkeypatch.setattr(support, "check_support", lambda *_: None)
    with pytest.raises(DependencyError, match=r"TensorRT >= 10\.3"):
        tune.compile_fastest(rung, old)
    with pytest.raises(DependencyError, match=r"TensorRT >= 10\.3"):
        build_engine(dataclasses.replace(config, tune=False), target=old)


def test_without_the_plugin_the_parser_refuses(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "register_own_kernels", lambda *_: 0)
    with pytest.raises(BuildError, match="Plugin not found"):
        build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)
    assert not list((bundle / "engines").glob(".kernels-*"))


def test_a_tensorrt_without_its_module_of_plugins(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(DependencyError, match=r"tensorrt\.plugin, which does not import here"):
        build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)


@needs_a_runner
def test_damaged_kernels_stop_the_build(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged() -> dict[str, Ptx]:
        raise IntegrityError("the kernel is damaged")

    monkeypatch.setattr(compat, "load_ptx", damaged)
    with pytest.raises(IntegrityError):
        run(bundle, "--kernels", "auto", "--tune")


@pytest.fixture
def wide(tmp_path: Path) -> Callable[[str], Path]:
    """Exports a bundle whose heads have 64 values, which own attention takes."""

    def make(dialect: str) -> Path:
        source = write_checkpoint(tmp_path / "wide-source", "qwen3", head_dim=64)
        return export(source, tmp_path / "wide", dialect=dialect, kv_capacity=128)

    return make


@pytest.mark.slow
@needs_a_runner
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_an_engine_with_own_attention(
    wide: Callable[[str], Path], target: Target, dialect: str
) -> None:
    bundle = wide(dialect)
    text = run(bundle, "--kernels", "own").stdout
    assert "own kernels: 9 layers, 2 attentions\n" in text
    assert "refused" not in text
    directory, info = only_engine(bundle)
    assert info.attention == "own"
    assert info.own_attentions == ("layers.0.attention", "layers.1.attention")
    kinds = [each.kind for each in info.layers for _ in range(each.count)]
    assert kinds.count("plugin_v3") == 9 + 2 + 2
    assert "softmax" not in kinds
    assert "attention_output" not in kinds
    assert {each.attention for each in info.compiled} == {"own"}
    assert info.buckets_read == ()
    partly = msgspec.structs.replace(info, left_linears={"layers.1.attention": "its cache is INT8"})
    assert partly.buckets_read == info.kv_buckets
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "9 linear layers, 2 attentions" in shown
    rung = plan_build(
        BuildConfig(bundle, max_prefill=32, kernels="own", attention="own"), read_manifest(bundle)
    )
    seconds, problem, _ = tune.measure(rung, directory)
    assert problem is None
    assert (seconds or 0) > 0


@needs_a_runner
def test_tuning_measures_own_kernels_with_and_without_attention(
    wide: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"own": 0.002, "decomposed": 0.004}
    monkeypatch.setattr(tune, "measure", lambda rung, *_: (seconds[rung.attention], None))
    bundle = wide("native")
    run(bundle, "--kernels", "auto", "--tune")
    info = only_engine(bundle)[1]
    assert [(each.kernels, each.attention) for each in info.tuned] == [
        ("tensorrt", "decomposed"),
        *(("own", each) for each in ("own", "decomposed")),
    ]
    assert (info.kernels, info.attention) == ("own", "own")


@needs_a_runner
def test_attention_that_stays_with_tensorrt(wide: Callable[[str], Path], target: Target) -> None:
    bundle = wide("native")
    run(bundle, "--kernels", "own", "--attention", "fused")
    info = only_engine(bundle)[1]
    assert (info.kernels, info.attention, info.own_attentions) == ("own", "fused", ())


def test_own_attention_goes_with_own_kernels(bundle: Path) -> None:
    choices: tuple[Any, ...] = ("tensorrt", "auto")
    for kernels in choices:
        with pytest.raises(ConfigError, match="add --kernels own"):
            BuildConfig(bundle, attention="own", kernels=kernels, tune=True)


# The audit


def test_the_audit_holds_for_attention_in_plugins(
    wide: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = wide("native")
    manifest = read_manifest(bundle)
    config = BuildConfig(bundle, max_prefill=32, kernels="own", attention="own")
    seen: list[Any] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return audit_network(*arguments)

    monkeypatch.setattr(variant, "audit_network", spy)
    assert compile_bundle(plan_build(config, manifest), target).audit.problems == ()
    ((network, _, shapes, kv_read, linears, attentions, _, outside),) = seen

    def problems(changed: dict[str, Any], names: tuple[str, ...] = attentions) -> list[str]:
        layers = tuple(changed.get(each.name, each) for each in network.layers)
        kept = dataclasses.replace(network, layers=tuple(each for each in layers if each))
        audit = audit_network(kept, manifest, shapes, kv_read, linears, names, outside=outside)
        return list(audit.problems)

    found = problems({}, attentions[:1])
    assert "layers.1.attention: a plugin that nobody asked for" in found
    assert "there are 0 attentions, not 1" in found
    assert "layers.0.attention: no two plugins" in problems(
        {"layers.0.attention/attention_parts": None}
    )
    layers = {each.name: each for each in network.layers}
    first, second = (layers[f"layers.{i}.attention/attention_parts"] for i in range(2))
    swapped = dataclasses.replace(
        first, inputs=(first.inputs[0], *second.inputs[1:3], *first.inputs[3:])
    )
    (problem,) = problems({first.name: swapped})
    assert problem.startswith("layers.0.attention: the plugin reads ['present.1.key', 'present.1.v")
    cast = layers["own_attention.positions/Cast"]
    nothing = dataclasses.replace(cast, inputs=())
    assert problems({cast.name: nothing}) == [
        f"layers.{i}.attention: the plugin does not know position_ids" for i in range(2)
    ]


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_the_audit_holds_for_plugins(
    tiny_bundles: Bundles, target: Target, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    bundle = tiny_bundles("qwen3", "native", quant)
    manifest = read_manifest(bundle)
    build = plan_build(BuildConfig(bundle, max_prefill=32, kernels="own"), manifest)
    seen: list[Any] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return audit_network(*arguments)

    monkeypatch.setattr(variant, "audit_network", spy)
    compiled = compile_bundle(build, target)
    assert compiled.audit.problems == ()
    ((network, _, shapes, kv_read, own, attentions, _, outside),) = seen
    assert attentions == ()
    assert own == tuple(manifest.quantization.linears)
    problems = audit_network(network, manifest, shapes, kv_read, (), outside=outside).problems
    assert f"{own[0]}: a plugin that nobody asked for" in problems
    assert f"{own[0]}: no matrix product with stored weights" in problems
    first, *more = (layer for layer in network.layers if layer.kind == "plugin_v3")
    without = dataclasses.replace(
        network, layers=tuple(each for each in network.layers if each is not first)
    )
    assert (
        f"{own[0]}: no plugin with stored weights"
        in audit_network(without, manifest, shapes, kv_read, own, outside=outside).problems
    )
    weights = first.inputs[1]
    assert weights is not None
    other = dataclasses.replace(weights, shape=(1, *weights.shape[1:]))
    spoiled = [
        dataclasses.replace(each, inputs=(each.inputs[0], other, *each.inputs[2:]))
        if each is first
        else each
        for each in network.layers
    ]
    (problem,) = audit_network(
        dataclasses.replace(network, layers=tuple(spoiled)),
        manifest,
        shapes,
        kv_read,
        own,
        outside=outside,
    ).problems
    assert problem.startswith(f"{own[0]}: the plugin's weights are int32 [1, ")
    assert len(more) == len(own) - 1
    problems = audit_network(network, manifest, shapes, kv_read, own).problems
    assert f"there is a further input, {weights.name}" in problems


# Options and refusals


@needs_a_runner
def test_auto_builds_one_engine_with_each_kind_of_kernels(
    wide: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And weighs a prefill with the decode steps of an answer."""
    seconds = {"tensorrt": (0.0040, 0.1), "own": (0.0039, 0.2)}
    monkeypatch.setattr(
        tune, "measure", lambda rung, *_: (seconds[rung.kernels][0], None, seconds[rung.kernels][1])
    )
    bundle = wide("native")
    done = run(bundle, "--kernels", "auto")
    assert re.search(r"building two engines, .* some 4 minutes \(predicted\)", done.stderr)
    assert "3.90 ms per decode step, 200 ms of prefill" in done.stdout
    directory, info = only_engine(bundle)
    # 0.2 + 256 * 0.0039 is more than 0.1 + 256 * 0.0040.
    assert (info.kernels, info.attention) == ("tensorrt", "decomposed")
    assert [(each.kernels, each.attention, each.prefill_s) for each in info.tuned] == [
        ("tensorrt", "decomposed", 0.1),
        ("own", "own", 0.2),
    ]
    assert rebuild_command(directory, info).endswith("--kernels auto")
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "3.90 ms per decode step, 200 ms of prefill" in " ".join(shown.split())
    seconds["own"] = (0.0030, 0.2)
    run(bundle, "--kernels", "auto", "--again")
    assert only_engine(bundle)[1].kernels == "own"


@needs_a_runner
def test_auto_tries_own_products_alone_if_own_attention_is_wrong(
    wide: Callable[[str], Path], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(rung: BuildPlan, *_: Any) -> Any:
        wrong = rung.attention == "own"
        return (None, "least cosine 0.31") if wrong else (0.001 + len(rung.kernels), None)

    monkeypatch.setattr(tune, "measure", measure)
    bundle = wide("native")
    run(bundle, "--kernels", "auto")
    info = only_engine(bundle)[1]
    assert [(each.kernels, each.attention) for each in info.tuned] == [
        ("tensorrt", "decomposed"),
        ("own", "own"),
        ("own", "decomposed"),
    ]
    assert (info.kernels, info.attention) == ("own", "decomposed")


@needs_a_runner
@pytest.mark.parametrize("on_jetson", [True, False])
def test_a_jetson_builds_with_both_unless_one_is_named(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch, on_jetson: bool
) -> None:
    monkeypatch.setattr(cli, "read_target", lambda: "jetpack7" if on_jetson else None)
    monkeypatch.setattr(
        tune, "measure", lambda rung, *_: (0.001 if rung.kernels == "own" else 0.002, None)
    )
    done = run(bundle)
    info = only_engine(bundle)[1]
    assert info.options["kernels"] == ("auto" if on_jetson else "tensorrt")
    assert info.kernels == ("own" if on_jetson else "tensorrt")
    assert ("two engines" in done.stderr) is on_jetson
    shutil.rmtree(bundle / "engines")
    named = run(bundle, "--kernels", "tensorrt")
    assert "two engines" not in named.stderr
    assert only_engine(bundle)[1].tuned == ()


def test_a_jetson_does_not_default_to_auto_if_it_times_nothing(
    pooling_bundles: PoolingBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "read_target", lambda: "jetpack7")
    embedding = pooling_bundles("embed", "portable", "int4")
    assert cli._default_kernels(embedding) == "tensorrt"
    with pytest.raises(ConfigError, match=r"--kernels auto times decode steps.*leave the option"):
        plan_build(BuildConfig(embedding, max_prefill=32, kernels="auto"), read_manifest(embedding))


@needs_a_runner
def test_unlocked_clocks_are_reported_before_a_build_and_recorded(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Snapshot(
        power_mode="MODE_30W", gpu_clock_min_hz=306_000_000, gpu_clock_max_hz=612_000_000
    )
    monkeypatch.setattr(telemetry, "read_snapshot", lambda: board)
    assert "follow the load (306 to 612 MHz)" in run(bundle).stderr
    directory, info = only_engine(bundle)
    assert (info.gpu_clocks_hz, info.power_mode) == ((306_000_000, 612_000_000), "MODE_30W")
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "306 to 612 MHz, by load, power mode MODE_30W" in " ".join(shown.split())
    fixed = msgspec.structs.replace(board, gpu_clock_min_hz=612_000_000)
    monkeypatch.setattr(telemetry, "read_snapshot", lambda: fixed)
    assert "follow the load" not in run(bundle, "--again").stderr


def test_unknown_kernels_are_refused(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="none of auto, own, tensorrt"):
        BuildConfig(bundle, kernels="mine")  # type: ignore[arg-type]
    assert BuildConfig(bundle).kernels == "tensorrt"


def test_trtexec_loads_no_plugin_of_python(bundle: Path, target: Target) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="own")
    with pytest.raises(ConfigError, match="--kernels own needs the Python API"):
        build_engine(config, via="trtexec", target=target)
    for kernels in (("own",), ("auto", "--tune")):
        with pytest.raises(ConfigError, match=rf"--kernels {kernels[0]} needs the Python API"):
            run(bundle, "--print-trtexec", "--trt", "10.16", "--kernels", *kernels)


@pytest.mark.parametrize(
    ("flavour", "version", "compute_capability", "reason"),
    [
        ("tensorrt-rtx", "1.7.0", "8.6", "TensorRT for RTX 1.7.0 has none; build with --kernels"),
        ("tensorrt", "10.2.0.19", "8.7", r"TensorRT >= 10\.3.*found 10.2.0.19.*JetPack 6.1"),
        ("tensorrt", "10.16.2", "7.5", "compute capability 8.0 or newer, this one has 7.5"),
    ],
)
def test_a_machine_without_own_kernels(
    flavour: Any, version: str, compute_capability: str, reason: str
) -> None:
    with pytest.raises(DependencyError, match=reason):
        support.check_own_kernels(flavour, version, compute_capability)


def test_a_machine_with_own_kernels() -> None:
    for compute_capability in ("8.0", "8.7", "11.0", "12.1"):
        support.check_own_kernels("tensorrt", "10.3.0", compute_capability)
        support.check_own_kernels("tensorrt", "10.13.3", compute_capability)
        support.check_own_kernels("tensorrt", "11.4.0", compute_capability)


def test_the_rungs_of_auto(bundle: Path, gpu: FakeGpu) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="auto", tune=True, attention="fused")
    rungs = make_rungs(plan_build(config, read_manifest(bundle)), target_of(gpu).rt)
    assert [rung.kernels for rung in rungs] == ["tensorrt", "own"]
    assert describe(rungs[1]) == "attention fused, cache read as slice, own kernels"


def test_an_older_engine_json_can_be_read(bundle: Path, target: Target) -> None:
    build_engine(BuildConfig(bundle, max_prefill=32), target=target)
    directory, info = only_engine(bundle)
    record = json.loads((directory / "engine.json").read_text())
    for name in ("kernels", "own_linears", "left_linears"):
        record.pop(name)
    (directory / "engine.json").write_text(json.dumps(record))
    assert read_engine_info(directory) == info
