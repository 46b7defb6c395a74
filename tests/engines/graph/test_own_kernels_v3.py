"""``build --kernels own`` for TensorRT before 10.13: plugins whose kernels Python launches."""

from __future__ import annotations

import base64
import dataclasses
import gc
import json
import shutil
import sys
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.testing import assert_array_equal

from edge.backends.step import step_after
from edge.backends.tensorrt import plugins
from edge.backends.tensorrt.launch_rules import (
    JOIN,
    PARTS,
    PRODUCT,
    TOP_K_MERGE,
    TOP_K_PARTS,
    PluginRule,
)
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.engine_file import EngineInfo, read_engine_info, rebuild_command
from edge.bundle.manifest import read_manifest
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.onnx_values import node_attributes
from edge.errors import (
    BackendError,
    BuildError,
    BundleError,
    ConfigError,
    DependencyError,
    DeviceError,
)
from edge_lab.cli.inspect import inspect
from edge_make.engine_record import record_engine
from engines.build_plan import plan_build
from engines.builder import build as build_module
from engines.builder import tune
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.config import BuildConfig
from engines.graph.own_kernels import use_own_kernels
from engines.kernels import plugin_v3
from engines.kernels.package import load_cubins, load_ptx
from tests.conftest import Bundles
from tests.engines.own_builds import (
    JETPACK6,
    check_graph,
    export,
    only_engine,
    rewrite,
    run,
    target_of,
)
from tests.makers.tiny_models import write_checkpoint
from tests.standins import plugin_v3 as fake_plugin_v3
from tests.standins.cuda import FakeGpu
from tests.standins.plugin_v3 import REGISTRY
from tests.standins.tensorrt import emptied, install


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    device = FakeGpu()
    install(monkeypatch, device, version=getattr(request, "param", JETPACK6))
    monkeypatch.setattr(REGISTRY, "creators", weakref.WeakValueDictionary())
    monkeypatch.setattr(plugins, "_registered", {})
    device.push()  # TensorRT takes the primary context
    with emptied(device):
        yield device
        device.live.pop("module", None)  # own kernels stay until the process ends
        device.pop()


@pytest.fixture
def target(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Target:
    module = sys.modules["tensorrt"]
    found = target_of(gpu, module.__version__)
    found = dataclasses.replace(found, rt=dataclasses.replace(found.rt, module=module))
    monkeypatch.setattr(build_module, "find_target", lambda **_options: found)
    return found


@pytest.fixture
def bundle(tiny_bundles: Bundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles("qwen2", "portable", "int4"), tmp_path / "bundle"))


@pytest.fixture
def built(bundle: Path, target: Target) -> Path:
    """A bundle with an engine, whose plugin this process has forgotten again."""
    build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)
    plugins._registered.clear()
    REGISTRY.creators.clear()
    return bundle


def open_engine(bundle: Path, **options: Any) -> TensorRTBackend:
    return TensorRTBackend(bundle, read_manifest(bundle), **options)


def decode(engine: TensorRTBackend, past: int) -> Any:
    embeds = np.zeros((1, 1, engine._manifest.model.hidden_size), np.float16)
    return engine.forward(step_after([0], [past], embeds, np.zeros((1, 1), np.int64)))


# The graph


@pytest.mark.parametrize(("quant", "planes"), [("int4", {1, 2}), ("int8", {2})])
def test_the_graph_names_the_plugin_of_python(
    tiny_bundles: Bundles, tmp_path: Path, quant: str, planes: set[int]
) -> None:
    bundle = tiny_bundles("qwen2", "portable", quant)
    compiled = rewrite(bundle)
    graph = (bundle / "decoder.onnx").read_bytes()
    own = use_own_kernels(graph, read_manifest(bundle), bundle, "python")
    check_graph(bundle, own)
    assert own.linears == compiled.linears
    used = {(PRODUCT.name, number) for number in planes}  # the head of int4 is INT8
    assert own.plugins == compiled.plugins == used
    nodes = [
        [node for node in OnnxFile(each.data).nodes if node.domain] for each in (own, compiled)
    ]
    assert own.outside is not None
    for python, other in zip(*nodes, strict=True):
        assert (python.inputs, python.outputs, python.name) == (
            *(other.inputs, other.outputs, other.name),
        )
        assert node_attributes(python) == {
            "plugin_namespace": "edge_llm",
            "plugin_version": "v3",
            "planes": own.outside.tensors[python.inputs[1]].shape[1],
        }


# Builds and runs


def test_an_engine_of_jetpack_6_runs_with_own_kernels(bundle: Path, target: Target) -> None:
    text = run(bundle, "--kernels", "own").stdout
    assert "own kernels: 9 layers\n" in text
    directory, info = only_engine(bundle)
    assert (info.kernels, info.plugins, len(info.own_linears)) == ("own", "python", 9)
    used = [(PRODUCT.name, 1), (PRODUCT.name, 2)]
    assert info.python_kernels == plugin_v3.pack_kernels(used, load_cubins("8.7"))
    assert rebuild_command(directory, info).endswith("--kernels own")
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "9 linear layers, launched by Python" in shown
    shown = CliRunner().invoke(inspect, [str(directory), "--json"], catch_exceptions=False).stdout
    assert (json.loads(shown)["plugins"], "python_kernels" in shown) == ("python", False)
    rung = plan_build(BuildConfig(bundle, max_prefill=32, kernels="own"), read_manifest(bundle))
    seconds, problem, _ = tune.measure(rung, directory)
    assert problem is None
    assert (seconds or 0) > 0
    again = json.loads(run(bundle, "--kernels", "own", "--json").stdout)
    assert (again["built"], again["kernels"]) == (False, "own")


def test_python_launches_a_decode_step_only_during_capture(built: Path, gpu: FakeGpu) -> None:
    gpu.calls.clear()
    engine = open_engine(built)
    assert engine.graphs_disabled is None
    first = gpu.calls.index("cuStreamBeginCapture")
    loads = [place for place, name in enumerate(gpu.calls) if name == "cuModuleLoadData"]
    assert len(loads) == 10
    assert max(loads) < first
    gpu.calls.clear()
    for past in range(4):
        decode(engine, past)
    assert "cuGraphLaunch" in gpu.calls
    assert "cuLaunchKernel" not in gpu.calls
    engine.close()
    gpu.calls.clear()
    engine = open_engine(built, use_cuda_graphs=False)
    assert "cuModuleLoadData" not in gpu.calls  # each is loaded once per process
    gpu.calls.clear()
    decode(engine, 0)
    assert gpu.calls.count("cuLaunchKernel") == 9
    engine.close()


def test_launches_do_not_wait_for_other_python_threads(
    built: Path,
) -> None:
    """For 5 ms at most, as Python has it, which is as long as a decode step of the 1.5B."""
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        open_engine(built).close()
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    finally:
        sys.setswitchinterval(before)


def test_a_later_build_reads_the_layers_too(
    built: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, info = only_engine(built)
    assert info.compiled
    change_info(built, compiled=[], compiled_unknown="the build was ended before it read them")
    record_engine(directory / "engine.json", (directory / "engine.json").read_bytes())
    config = BuildConfig(built, max_prefill=32, kernels="own")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.driver", None)
        without = build_engine(config, target=target).info
    assert without.compiled == ()
    assert "needs cuda-bindings" in str(without.compiled_unknown)
    again = build_engine(config, target=target)
    assert not again.built
    assert again.info == read_engine_info(directory) == info


def test_int8_in_two_planes(tiny_bundles: Bundles, tmp_path: Path, target: Target) -> None:
    bundle = Path(shutil.copytree(tiny_bundles("llama", "portable", "int8"), tmp_path / "bundle"))
    result = build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)
    used = [(PRODUCT.name, 2)]
    assert result.info.python_kernels == plugin_v3.pack_kernels(used, load_cubins("8.7"))
    engine = open_engine(bundle)
    decode(engine, 0)
    engine.close()


@pytest.mark.slow
def test_tuning_takes_own_kernels_too(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"own": 0.002, "tensorrt": 0.003}
    measure = tune.measure

    def planted(rung: Any, directory: Path, progress: Any) -> Any:
        _, problem, _ = measure(rung, directory, progress)
        assert problem is None
        return seconds[rung.kernels], None

    monkeypatch.setattr(tune, "measure", planted)
    result = json.loads(run(bundle, "--kernels", "auto", "--tune", "--json").stdout)
    assert result["kernels"] == "own"
    info = only_engine(bundle)[1]
    assert [each.kernels for each in info.tuned] == ["tensorrt", "own"]
    assert info.plugins == "python"
    open_engine(bundle).close()


def test_without_own_kernels_nothing_is_registered(
    bundle: Path, target: Target, gpu: FakeGpu
) -> None:
    run(bundle)
    assert only_engine(bundle)[1].plugins is None
    open_engine(bundle).close()
    assert REGISTRY.creators == {}
    assert plugins._registered == {}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A bundle whose heads have 64 values, which own attention takes."""
    source = write_checkpoint(tmp_path / "wide-source", "qwen3", head_dim=64)
    return export(source, tmp_path / "wide", kv_capacity=128)


@pytest.mark.slow
def test_an_engine_of_jetpack_6_runs_with_own_attention(wide: Path, target: Target) -> None:
    text = run(wide, "--kernels", "own").stdout
    assert "own kernels: 9 layers, 2 attentions\n" in text
    assert "refused" not in text
    directory, info = only_engine(wide)
    assert (info.kernels, info.plugins, info.attention) == ("own", "python", "own")
    assert info.own_attentions == ("layers.0.attention", "layers.1.attention")
    kinds = [each.kind for each in info.layers for _ in range(each.count)]
    assert kinds.count("plugin_v3") == 9 + 2 + 2
    assert "softmax" not in kinds
    used = [(PRODUCT.name, 1), (PRODUCT.name, 2), (PARTS.name, 64), (JOIN.name, 64)]
    assert info.python_kernels == plugin_v3.pack_kernels(used, load_cubins("8.7"))
    assert len(info.python_kernels) == 4
    assert (directory / "engine.json").stat().st_size < 300_000
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "9 linear layers, 2 attentions, launched by Python" in shown
    # Any order of tactics, prompts, drafts and decode: the same as the graph on the CPU.
    config = BuildConfig(wide, max_prefill=32, kernels="own", attention="own")
    seconds, problem, _ = tune.measure(plan_build(config, read_manifest(wide)), directory)
    assert problem is None
    assert (seconds or 0) > 0


def test_python_launches_attention_only_during_capture(
    wide: Path, target: Target, gpu: FakeGpu
) -> None:
    config = BuildConfig(wide, max_prefill=32, kernels="own", attention="own")
    assert build_engine(config, target=target).info.own_attentions
    plugins._registered.clear()
    REGISTRY.creators.clear()
    gpu.calls.clear()
    engine = open_engine(wide)
    assert engine.graphs_disabled is None
    first = gpu.calls.index("cuStreamBeginCapture")
    loads = [place for place, name in enumerate(gpu.calls) if name == "cuModuleLoadData"]
    assert len(loads) == 2 * 5 + 2 * 2
    assert max(loads) < first
    gpu.calls.clear()
    for past in range(4):
        decode(engine, past)
    assert "cuGraphLaunch" in gpu.calls
    assert "cuLaunchKernel" not in gpu.calls
    engine.close()
    engine = open_engine(wide, use_cuda_graphs=False)
    gpu.calls.clear()
    decode(engine, 0)
    assert gpu.calls.count("cuLaunchKernel") == 9 + 2 + 2
    assert not [name for name in gpu.calls if "Alloc" in name]
    engine.close()


def test_tuning_takes_own_attention_too(
    wide: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {("tensorrt", None): 0.004, ("own", "own"): 0.002, ("own", None): 0.003}

    def planted(rung: Any, *_: Any) -> Any:
        return seconds[rung.kernels, rung.attention], None

    monkeypatch.setattr(tune, "measure", planted)
    run(wide, "--kernels", "auto", "--tune")
    info = only_engine(wide)[1]
    assert [(each.kernels, each.attention) for each in info.tuned] == list(seconds)
    assert (info.kernels, info.attention, info.plugins) == ("own", "own", "python")
    open_engine(wide).close()


def test_an_engine_of_jetpack_6_finds_the_best_logits(
    bundle: Path, target: Target, gpu: FakeGpu
) -> None:
    text = run(bundle, "--kernels", "own", "--best-logits", "16").stdout
    assert "own kernels: 9 layers, best logits\n" in text
    directory, info = only_engine(bundle)
    assert (info.own_top_k, info.plugins, info.left_linears) == (True, "python", {})
    used = [(PRODUCT.name, 1), (PRODUCT.name, 2), (TOP_K_PARTS.name, 16), (TOP_K_MERGE.name, 16)]
    assert info.python_kernels == plugin_v3.pack_kernels(used, load_cubins("8.7"))
    shown = CliRunner().invoke(inspect, [str(directory)], catch_exceptions=False).stdout
    assert "9 linear layers, best logits, launched by Python" in " ".join(shown.split())
    engine = open_engine(bundle, use_cuda_graphs=False)
    embeds = np.zeros((1, 1, engine._manifest.model.hidden_size), np.float16)
    step = step_after([0], [0], embeds, np.zeros((1, 1), np.int64))
    gpu.calls.clear()
    assert engine.forward_best is not None
    ((best,),) = engine.forward_best(step)
    assert gpu.calls.count("cuLaunchKernel") == 9 + 2
    row = engine.forward(step)[0]
    order = np.argsort(-np.asarray(row, np.float64).ravel(), kind="stable")[:16]
    assert_array_equal(best.ids, order)
    engine.close()


# What goes wrong


def change_info(bundle: Path, **fields: Any) -> EngineInfo:
    directory, info = only_engine(bundle)
    record = json.loads((directory / "engine.json").read_text())
    record.update(fields)
    (directory / "engine.json").write_text(json.dumps(record))
    return info


def test_a_tensorrt_without_such_plugins(
    built: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REGISTRY, "refuses", (JOIN.name,))
    with pytest.raises(DependencyError, match=r"30 did not register the plugin attention_join .*6"):
        open_engine(built)
    gc.collect()
    # TensorRT has the address of those that it took.
    assert [name for name, *_ in REGISTRY.creators] == [PRODUCT.name, PARTS.name]
    monkeypatch.delattr(sys.modules["tensorrt"], "IPluginV3")
    with pytest.raises(DependencyError, match=r"plugins in Python, which TensorRT 10\.3.*does not"):
        open_engine(built)
    assert plugins._registered == {}


def test_cuda_bindings_are_missing(
    built: Path, bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DependencyError, match=r"own kernels for TensorRT < 10.13 needs cuda-bind"):
        open_engine(built)
    config = BuildConfig(bundle, max_prefill=32, kernels="own", best_logits=8)
    with pytest.raises(DependencyError, match=r"install cuda-bindings"):
        build_engine(config, target=target)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ([], r"own kernels of number -?\d+, which engine.json does not have"),
        ([base64.b64encode(b"nothing").decode()], r"own kernels in engine.json are damaged"),
        ([base64.b64encode(zlib.compress(b"[{}]")).decode()], "are damaged"),
        ([base64.b64encode(zlib.compress(b"[" * 100_000)).decode()], "are damaged"),
        (["?"], "engine.json is damaged"),
    ],
)
def test_an_engine_json_without_the_kernels(built: Path, kernels: list[str], message: str) -> None:
    change_info(built, python_kernels=kernels)
    with pytest.raises(BundleError, match=message):
        open_engine(built)


def test_a_plan_with_python_plugins_missing_from_engine_json_is_refused(built: Path) -> None:
    change_info(built, plugins=None)
    with pytest.raises(BackendError, match=r"getCreator: Cannot find.*w4_linear"):
        open_engine(built)


def test_a_failed_launch_is_reported(
    built: Path, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = open_engine(built, use_cuda_graphs=False)
    decode(engine, 0)
    place = len(gpu.calls)
    decode(engine, 1)
    before = gpu.calls[place:].index("cuLaunchKernel")
    gpu.fail_at, gpu.fail_code = len(gpu.calls) + before, 1
    with pytest.raises(DeviceError, match=r"could not launch a kernel: cuLaunchKernel failed"):
        decode(engine, 2)
    assert "Exception thrown from enqueue()" in capsys.readouterr().err
    decode(engine, 2)
    gpu.fail_at, gpu.fail_code = len(gpu.calls) + before, 700
    with pytest.raises(DeviceError, match=r"illegal memory access.*start the process anew"):
        decode(engine, 3)
    assert engine.failed
    gpu.lost = gpu.fail_at = None
    engine.close()


def test_a_launch_that_fails_during_capture_leaves_the_engine_usable(
    built: Path, gpu: FakeGpu
) -> None:
    open_engine(built).close()
    gpu.calls.clear()
    open_engine(built).close()
    _trial, first, *_ = (
        place for place, name in enumerate(gpu.calls) if name == "cuStreamBeginCapture"
    )
    gpu.fail_at, gpu.fail_code = gpu.calls.index("cuLaunchKernel", first), 1
    gpu.calls.clear()
    engine = open_engine(built)
    assert "could not launch a kernel" in (engine.graphs_disabled or "")
    decode(engine, 0)
    engine.close()


def test_kernels_that_do_not_load_are_reported(
    built: Path, target: Target, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = sys.modules["cuda.bindings.driver"]
    monkeypatch.setattr(driver, "cuModuleLoadData", lambda _image: (200, None))
    monkeypatch.setattr(driver, "cuGetErrorString", lambda _code: (0, b"invalid image"))
    with pytest.raises(DeviceError, match=r"could not load a kernel: .*invalid image"):
        open_engine(built)
    config = BuildConfig(built, max_prefill=32, kernels="own", best_logits=8)
    plugins._registered.clear()
    REGISTRY.creators.clear()
    with pytest.raises(BuildError, match=r"own kernels do not run while TensorRT 10\.3.*invalid"):
        build_engine(config, target=target)


def test_a_graph_whose_plugin_cannot_be_made(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("in the plugin")

    monkeypatch.setattr(plugin_v3, "_build_class", fail)
    with pytest.raises(BuildError, match="a plugin with own kernels failed: ZeroDivisionError"):
        build_engine(BuildConfig(bundle, max_prefill=32, kernels="own"), target=target)


def test_ptx_is_taken_where_the_driver_loads_no_machine_code(
    bundle: Path, target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is older than the assembler may not."""
    driver = sys.modules["cuda.bindings.driver"]
    load = driver.cuModuleLoadData
    monkeypatch.setattr(
        driver,
        "cuModuleLoadData",
        lambda image: (209, None) if image.startswith(b"\x7fELF") else load(image),
    )
    run(bundle, "--kernels", "own")
    info = only_engine(bundle)[1]
    used = [(PRODUCT.name, 1), (PRODUCT.name, 2)]
    assert info.python_kernels == plugin_v3.pack_kernels(used, load_ptx())
    assert "w4_linear is compiled by the driver at each start instead" in caplog.text
    open_engine(bundle).close()


def test_a_profile_is_timed_with_the_tactics_for_its_rows(
    bundle: Path, wide: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: dict[Any, tuple[int, ...]] = {}
    monkeypatch.setattr(fake_plugin_v3, "TIMED", timed)
    run(bundle, "--kernels", "own", "--max-batch", "4", "--kv-capacity", "64")
    depth = read_manifest(bundle).model.hidden_size
    products = {
        (usual[:2], largest[:2]): tactics
        for (name, usual, largest), tactics in timed.items()
        if name == PRODUCT.name and usual[-1] == depth
    }
    assert products == {
        ((1, 32), (1, 32)): (5,),  # prefill: 128 rows at a time
        ((4, 1), (4, 1)): (3, 5),  # decode: 4 rows, or 128
        ((4, 8), (4, 8)): (5,),  # ends of prompts
    }
    timed.clear()
    run(wide, "--kernels", "own")
    heads = {
        (name, usual[2] if name == PARTS.name else None): tactics
        for (name, usual, _), tactics in timed.items()
        if name == PARTS.name
    }
    assert heads == {(PARTS.name, 32): (2,), (PARTS.name, 1): (1,)}


@pytest.mark.parametrize("step", ["parse", "build"])
def test_own_products_stay_if_own_attention_fails_and_the_record_says_why(
    wide: Path, target: Target, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    build_class = plugin_v3._build_class

    def failing(trt: Any, rule: PluginRule) -> Any:
        made = build_class(trt, rule)
        if rule is not PARTS:
            return made
        if step == "parse":
            raise ZeroDivisionError("attention, planted")

        class Failing(made):  # type: ignore[misc, valid-type]
            @plugins.told
            def configure_plugin(self, inputs: Any, outputs: Any) -> None:
                raise ZeroDivisionError("attention, planted")

        return Failing

    monkeypatch.setattr(plugin_v3, "_build_class", failing)
    lines = run(wide, "--kernels", "own").stdout.splitlines()
    assert "own kernels: 9 layers" in lines
    (refused,) = (line for line in lines if line.startswith("refused: "))
    assert refused.startswith("refused: attention own, cache read as slice, own kernels: ")
    assert "a plugin with own kernels failed: ZeroDivisionError: attention, planted" in refused
    assert lines[-1] == "taken: attention of primitive operators, cache read as slice, own kernels"
    directory, info = only_engine(wide)
    assert (info.kernels, info.attention, info.own_attentions) == ("own", None, ())
    assert [(each.attention, each.kernels) for each in info.refused] == [("own", "own")]
    assert "attention, planted" in (directory / "build.log").read_text()
    assert "--kernels own" in rebuild_command(directory, info)
    open_engine(wide).close()


def test_the_first_failure_is_kept_once(gpu: FakeGpu) -> None:
    module = sys.modules["tensorrt"]
    plugins.raise_failure(module)
    own_kernels = plugins.register(module)
    with pytest.raises(BackendError, match="built by edge-llm build only"):
        own_kernels.for_build(PRODUCT, 1)
    own_kernels.keep(KeyboardInterrupt())
    own_kernels.keep(ValueError("a consequence"))
    with pytest.raises(KeyboardInterrupt):
        plugins.raise_failure(module)
    plugins.raise_failure(module)
    own_kernels.keep(ValueError("alone"))
    with pytest.raises(BackendError, match=r"ValueError: alone.*--kernels tensorrt"):
        plugins.raise_failure(module)


# What engine.json has


def test_an_engine_json_keeps_the_kernels(built: Path) -> None:
    directory, info = only_engine(built)
    assert read_engine_info(directory) == info
    again = msgspec.json.decode(msgspec.json.encode(info), type=EngineInfo)
    assert again.python_kernels == info.python_kernels
    assert (directory / "engine.json").stat().st_size < 200_000


# Which kind


@pytest.mark.parametrize("gpu", ["10.16.2.10"], indirect=True)
def test_python_plugins_can_be_chosen_from_10_13_on(
    bundle: Path, target: Target, gpu: FakeGpu
) -> None:
    """And in steps of all kinds it launches none: they are graphs, prompts too."""
    run(bundle, "--kernels", "own", "--plugins", "python", "--max-batch", "2")
    directory, info = only_engine(bundle)
    assert directory.name.endswith("own-kernels-python-plugins")
    assert (info.plugins, bool(info.python_kernels)) == ("python", True)
    assert rebuild_command(directory, info).endswith("--kernels own --plugins python")
    engine = open_engine(bundle, max_draft_tokens=3)
    gpu.calls.clear()
    hidden, random = engine._manifest.model.hidden_size, np.random.default_rng(0)
    for tokens, slots, num in ((1, 2, 1), (7, 1, 1), (32, 1, 1), (3, 2, 3), (30, 1, 30)):
        embeds = random.normal(size=(slots, tokens, hidden)).astype(np.float16)
        wanted = np.tile(np.arange(tokens - num, tokens), (slots, 1))
        engine.forward(step_after(list(range(slots)), [0] * slots, embeds, wanted))
    assert "cuGraphLaunch" in gpu.calls
    assert "cuLaunchKernel" not in gpu.calls
    engine.close()


def test_an_unknown_plugin_kind_is_refused(bundle: Path, target: Target) -> None:
    config = BuildConfig(bundle, max_prefill=32, kernels="own", plugins="aot")
    with pytest.raises(DependencyError, match=r"--plugins aot needs TensorRT >= 10.13, found 10.3"):
        build_engine(config, target=target)
    with pytest.raises(ConfigError, match="add --kernels own"):
        BuildConfig(bundle, plugins="python")
    with pytest.raises(ConfigError, match="--plugins c is none of auto, aot, python"):
        BuildConfig(bundle, kernels="own", plugins="c")  # type: ignore[arg-type]
