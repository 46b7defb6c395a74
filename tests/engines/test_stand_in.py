"""The stand-in of TensorRT builds by the table of rules itself, whoever asked the table before.

So a test that passes on it says that the graph is legal by the table, and that nothing between the
table and the audit has changed it. It does not say that the table is right: `rules.test_releases`
holds that to NVIDIA's documents, and TensorRT for RTX compiles what `test_builder` gives it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shlex
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.testing import assert_allclose

from edge.bundle import io_spec
from edge.bundle.engine_file import find_engines, read_engine_info
from edge.bundle.manifest import Dialect, read_manifest
from edge.bundle.onnx_file import ELEMENT_NUMBERS, Message, Node, OnnxFile, attribute
from edge.bundle.sizes import activation_bytes
from edge.device.gpu import Gpu
from edge.errors import BackendError, BuildError, ConfigError
from edge_make.engine_profiles import profile_limits
from edge_make.target import write_durably
from engines import cli
from engines.build_plan import BuildPlan, plan_build
from engines.builder import build as build_module
from engines.builder import fallbacks, store, variant
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.builder.variant import compile_bundle
from engines.compiler import compat
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from engines.rules.bundle import check_bundle_rules, parse_versions
from engines.rules.table import RULES, VERSIONS
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import FEW_TOKENS, RUNNABLE, TINY_KV_CAPACITY, Bundles, require_kernels
from tests.edge.backends.runner import Runner, random_ids
from tests.edge.backends.tensorrt.gpu_runner import ATOL, GpuRunner
from tests.engines.rules.test_bundle import plant
from tests.engines.rules.test_rules import PLANTED
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint
from tests.standins import builder as fake_builder
from tests.standins import network as fake_network
from tests.standins import parser as fake_parser
from tests.standins.builder import TimingCache
from tests.standins.cuda import FakeGpu, RuleError
from tests.standins.network import Planted
from tests.standins.tensorrt import (
    NO_CUDA,
    FakeEngine,
    emptied,
    fake_plan,
    install,
    make_module,
    start_nothing,
)

COLUMNS = [version.name for version in VERSIONS if version.flavour == "tensorrt"]


@pytest.fixture
def copied(tiny_bundles: Bundles, tmp_path: Path) -> Callable[[Dialect, str], Path]:
    def copy(dialect: Dialect, quant: str) -> Path:
        if quant == "per-token":
            config = ExportConfig(
                str(write_loud_checkpoint(tmp_path / "model", "qwen2", layers=(0, 1))),
                tmp_path / "bundle",
                quant="int8-w8a8",
                dialect=dialect,
                group_size=32,
                calibration_tokens=FEW_TOKENS,
                kv_capacity=TINY_KV_CAPACITY,
            )
            with loud_by_token():
                linears = export_checkpoint(config).quantization.linears
            assert linears["layers.1.down"].rotation_block
            return config.output
        return Path(shutil.copytree(tiny_bundles("qwen2", dialect, quant), tmp_path / "bundle"))

    return copy


def target(gpu: FakeGpu, version: str = "10.16.2.10", planted: Planted | None = None) -> Target:
    module = make_module(gpu, version, planted=planted or Planted())
    return Target(TensorRT(module, "tensorrt", version), Gpu("Orin", "8.7"), "8.7")


def plan_of(bundle: Path, **options: Any) -> BuildPlan:
    return plan_build(BuildConfig(bundle, **{"max_prefill": 32, **options}), read_manifest(bundle))


# The gate is the product's; behind it is another


def test_our_own_check_reports_first(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied("portable", "int4")
    plant(bundle, "int8")
    monkeypatch.setattr(fake_builder.Builder, "__init__", None)  # nobody may make one
    with pytest.raises(BuildError, match=r"10\.3 does not take .*rule block-type"):
        build_engine(BuildConfig(bundle, max_prefill=32), target=target(gpu, "10.3.0.30"))


def test_without_it_the_builder_refuses(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied("portable", "int4")
    plant(bundle, "int8")
    monkeypatch.setattr(variant, "refuse_illegal", lambda *_: [])
    with pytest.raises(BuildError, match=r"10\.3\.0\.30 failed to build .*rule block-type"):
        build_engine(BuildConfig(bundle, max_prefill=32), target=target(gpu, "10.3.0.30"))
    assert not list((bundle / "engines").glob("*/engine.json"))
    log = next((bundle / "engines").glob("*/build.log")).read_text()
    assert "error: Error Code 4: API Usage Error" in log


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("quant", ["fp16", "int4", "int8", "int8-w8a8"])
@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_it_takes_what_the_table_takes(
    dialect: str,
    quant: str,
    name: str,
    gpu: FakeGpu,
    tiny_bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every recipe and version, past the product's checks; what is built passes the audit."""
    bundle = tiny_bundles("qwen2", dialect, quant)
    (verdict,) = check_bundle_rules(bundle, parse_versions(name))
    monkeypatch.setattr(variant, "refuse_illegal", lambda *_: [])
    build = plan_of(bundle, max_batch=4)
    if not verdict.legal:
        with pytest.raises(BuildError, match=f"rule {verdict.refusals[0].rule}"):
            compile_bundle(build, target(gpu, f"{name}.0.1"))
        return
    compiled = compile_bundle(build, target(gpu, f"{name}.0.1"))
    assert compiled.audit.problems == ()
    assert list(compiled.scratch_bytes) == ["prefill", "decode", "batch"]


def replace_input(graph: OnnxFile, node: Node, place: int, dtype: str, shape: Any, raw: bytes):
    tensor = Message()
    for size in shape:
        tensor.add(1, size)
    name = f"planted.{place}"
    graph.proto.add(5, tensor.add(2, ELEMENT_NUMBERS[dtype]).add(8, name).add(9, raw))
    node.inputs[place] = name


def negative_scale(graph: OnnxFile) -> None:
    node = next(node for node in graph.nodes if node.op_type == "DequantizeLinear")
    shape = graph.external_tensors()[node.inputs[1]].shape
    values = np.full(shape, -1, np.float16)
    replace_input(graph, node, 1, "fp16", shape, values.tobytes())


def newer_operator(graph: OnnxFile) -> None:
    next(node for node in graph.nodes if node.op_type == "Sigmoid").op_type = "Swish"


def own_operator(graph: OnnxFile) -> None:
    next(node for node in graph.nodes if node.op_type == "Sigmoid").domain = "com.microsoft"


def mixed_types(graph: OnnxFile) -> None:
    node = next(node for node in graph.nodes if node.op_type == "Add")
    values = np.zeros(1, np.float32)
    replace_input(graph, node, 1, "fp32", (1,), values.tobytes())


def causal(graph: OnnxFile) -> None:
    node = next(node for node in graph.nodes if node.op_type == "Attention")
    node.attributes.append(attribute("is_causal", 1))


def lengths_that_are_ignored(graph: OnnxFile) -> None:
    node = next(node for node in graph.nodes if node.op_type == "Attention")
    node.inputs += ["", "", io_spec.WRITE_INDICES]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (negative_scale, r"cannot parse .*operator DequantizeLinear: .*rule scale-positive"),
        (newer_operator, r"cannot parse .*operator Swish: .*rule operators"),
        (own_operator, r"cannot parse .*operator Sigmoid: .*rule domain"),
        (mixed_types, r"failed to build .*Add must have same input types.*fp16 and fp32"),
    ],
)
def test_each_planted_fault_is_refused_where_it_is_found(
    change: Callable[[OnnxFile], None], words: str, tiny_bundles: Bundles
) -> None:
    with pytest.raises(BuildError, match=words):
        fake_plan(plan_of(tiny_bundles("qwen2", "native", "int4")), change=changed_by(change))


@pytest.mark.parametrize("change", [causal, lengths_that_are_ignored])
def test_silently_wrong_answers_of_tensorrt_fail_the_test(
    change: Callable[[OnnxFile], None], tiny_bundles: Bundles
) -> None:
    with pytest.raises(RuleError, match=r"would take this and answer wrong: .*rule attention-"):
        fake_plan(plan_of(tiny_bundles("qwen2", "native", "int4")), change=changed_by(change))


def changed_by(change: Callable[[OnnxFile], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        graph = OnnxFile(data)
        change(graph)
        return graph.serialize()

    return edit


@pytest.mark.parametrize(
    ("rule", "make", "change"),
    [fault[:3] for fault in PLANTED],
    ids=[f"{fault[0]}-{number}" for number, fault in enumerate(PLANTED)],
)
def test_every_fault_that_the_table_knows_is_refused(
    rule: str, make: Callable[[], Any], change: Callable[[Any], None], gpu: FakeGpu
) -> None:
    graph = make()
    change(graph)
    module = make_module(gpu, "10.16.2.10" if rule == "int8-half-scale" else "11.1.0.9")
    said: list[str] = []

    class Logger(fake_network.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            said.append(msg)

    maker = module.Builder(Logger())
    network = maker.create_network(1 << module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    try:
        if module.OnnxParser(network, Logger()).parse(graph.serialize()):
            assert maker.build_serialized_network(network, maker.create_builder_config()) is None
    except RuleError as error:
        said.append(str(error))
    assert f"rule {rule}" in " ".join(said)


def test_the_rules_that_it_knows_by_name_are_in_the_table() -> None:
    assert {rule.name for rule in RULES} >= fake_parser.SILENT_RULES


def test_a_file_that_is_not_there_is_a_parsers_error(copied: Any) -> None:
    bundle = copied(RUNNABLE, "int4")
    build = plan_of(bundle)
    (bundle / "decoder.onnx.data").unlink()
    with pytest.raises(BuildError, match=r"the file as a whole: Failed to open file .*onnx\.data"):
        fake_plan(build)


# What it builds is an engine


@pytest.mark.parametrize(
    ("dialect", "quant", "version", "options"),
    [
        ("portable", "int8", "10.3.0.30", {}),
        ("portable", "int8-w8a8", "10.7.0.23", {}),
        ("portable", "per-token", "10.3.0.30", {}),
        ("native", "per-token", "11.4.0.106", {}),
        ("native", "int4", "10.16.2.10", {}),
        ("native", "int4", "11.4.0.106", {"kv_read": "lengths"}),
    ],
)
def test_a_build_of_each_version_answers_as_the_cpu(
    dialect: str,
    quant: str,
    version: str,
    options: Any,
    gpu: FakeGpu,
    copied: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From ``build`` to logits, without a word of the product replaced."""
    require_kernels(dialect)
    bundle = copied(dialect, quant)
    install(monkeypatch, gpu, version=version)
    config = BuildConfig(bundle, max_prefill=24, max_batch=2, **options)
    built = build_engine(config, target=target(gpu, version))
    assert built.info.tensorrt_version == version
    assert built.info.compiled  # the layers could be read
    with GpuRunner(bundle, gpu) as ours, Runner(bundle, int8_activations=False) as theirs:
        assert ours.engine.info == built.info
        for step, seq in enumerate((17, 3, 1, 1, 1, 1)):
            ids = random_ids(2, seq, seed=step)
            found, wanted = ours.step(ids, [0, 1]), theirs.step(ids, [0, 1])
            # Here and there a rounding to FP16 is a step of 1/127 more.
            steps = {"int8-w8a8": 1, "per-token": 2}.get(quant)
            if steps is not None:
                assert np.abs(found - wanted).mean() < steps * ATOL
            else:
                assert_allclose(found, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [
        ("10.16.1.11", (8, 7), r"expecting library version 10\.16\.1\.11 got 10\.16\.2\.10"),
        ("10.16.2.10", (11, 0), r"expecting compute 11\.0 got compute 8\.7"),
    ],
)
def test_a_plan_of_another_tensorrt_or_gpu_does_not_load(
    version: str,
    capability: tuple[int, int],
    words: str,
    gpu: FakeGpu,
    tiny_bundles: Bundles,
    tmp_path: Path,
) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(fake_plan(plan_of(tiny_bundles("qwen2"))))
    gpu.compute_capability = capability
    rt = TensorRT(make_module(gpu, version), "tensorrt", version)
    with pytest.raises(BuildError, match=words):
        compat.inspect_plan(rt, plan.read_bytes(), 2)


def test_the_command_of_a_plan_that_does_not_load_builds_it(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied(RUNNABLE, "int4")
    install(monkeypatch, gpu)
    here = target(gpu)
    monkeypatch.setattr(build_module, "find_target", lambda **_options: here)
    info = build_engine(BuildConfig(bundle, max_prefill=24)).info
    runtime = sys.modules["tensorrt"].Runtime
    monkeypatch.setattr(runtime, "deserialize_cuda_engine", lambda *_: None)
    with (
        pytest.raises(BackendError, match="TensorRT cannot load") as refused,
        GpuRunner(bundle, gpu),
    ):
        pass
    _, verb, *line = shlex.split(str(refused.value).split("build it again with: ")[1])
    assert verb == "build"
    result = CliRunner().invoke(cli.build, [*line, "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert told["built"]
    (directory,) = find_engines(bundle)
    assert read_engine_info(directory).key == info.key
    with pytest.raises(ConfigError, match="--again has no effect with --print-trtexec"):
        CliRunner().invoke(cli.build, [*line, "--print-trtexec"], catch_exceptions=False)


@pytest.mark.parametrize("with_pycuda", [True, False])
def test_an_engine_is_for_the_number_of_active_multiprocessors(
    with_pycuda: bool, copied: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A Jetson's power mode turns some off; the engine runs all the same."""
    bundle = copied(RUNNABLE, "int4")
    gpu = FakeGpu(num_sms=16, with_pycuda=with_pycuda)
    gpu.push()
    install(monkeypatch, gpu)
    here = target(gpu)

    def build(num_sms: int) -> build_module.BuildResult:
        found = dataclasses.replace(here, gpu=Gpu("Orin", "8.7", num_sms))
        return build_engine(BuildConfig(bundle, max_prefill=24), target=found)

    with emptied(gpu):
        assert build(8).info.num_sms == 8
        assert not build(8).built
        with GpuRunner(bundle, gpu) as runner:
            runner.step(random_ids(1, 9))
        assert "tuned for 8 multiprocessors, and 16 are on" in caplog.text
        assert build(16).built
        caplog.clear()
        with GpuRunner(bundle, gpu):
            assert "multiprocessors" not in caplog.text
        gpu.pop()


def test_a_plan_runs_without_its_bundle(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its weights in it, as a plan does."""
    bundle = copied(RUNNABLE, "int4")
    install(monkeypatch, gpu)
    build_engine(BuildConfig(bundle, max_prefill=24), target=target(gpu))
    ids = random_ids(1, 9)
    with GpuRunner(bundle, gpu) as runner:
        expected = runner.step(ids)
    (bundle / "decoder.onnx.data").write_bytes(b"")
    (bundle / "decoder.onnx").write_bytes(b"")
    with GpuRunner(bundle, gpu) as runner:
        assert (runner.step(ids) == expected).all()


def test_attention_without_a_fused_kernel_is_decomposed(gpu: FakeGpu, copied: Any) -> None:
    bundle = copied("native", "int4")
    here = target(gpu, planted=Planted(no_fused="no tactic for head_dim 16"))
    info = build_engine(BuildConfig(bundle, max_prefill=32), target=here).info
    assert info.attention == "decomposed"
    assert info.refused == ()
    assert {each.attention for each in info.compiled} == {"decomposed"}


def test_a_refused_build_frees_its_builder(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the network with all weights in it."""
    made: list[weakref.ref[Any]] = []

    class Watched(compat.Compiler):
        def __init__(self, *args: Any) -> None:
            assert not any(each() for each in made)
            super().__init__(*args)
            made.append(weakref.ref(self))

        def build(self, *args: Any, **options: Any) -> Any:
            if len(made) == 1:
                raise BuildError("no kernel (planted)")
            return super().build(*args, **options)

    monkeypatch.setattr(variant, "Compiler", Watched)
    config = BuildConfig(copied("native", "int4"), max_prefill=32, kv_read="auto")
    assert build_engine(config, target=target(gpu)).built
    assert len(made) == 2


def test_ctrl_c_during_a_parser_message_ends_the_build(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The runner of tests in several processes ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    parse = fake_parser.OnnxParser.parse

    def interrupted(parser: Any, *args: Any) -> bool:
        try:
            signal.raise_signal(signal.SIGINT)
            parser._logger.log(fake_network.Severity.INFO, "while the signal comes")
        except BaseException:  # noqa: BLE001 - as the bindings do, which print it
            pass
        return parse(parser, *args)

    monkeypatch.setattr(fake_parser.OnnxParser, "parse", interrupted)
    bundle = copied("portable", "fp16")
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(BuildConfig(bundle, max_prefill=32), target=target(gpu))
        assert not find_engines(bundle)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_failing_to_keep_timings_or_logs_costs_no_engine(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Timings and log, whose place is lost during the build."""
    bundle = copied("portable", "fp16")
    caches = bundle.parent / "caches"
    caches.mkdir()

    def compiled(*args: Any, **options: Any) -> Any:
        caches.rmdir()
        caches.touch()
        return compile_bundle(*args, **options)

    monkeypatch.setattr(fallbacks, "compile_bundle", compiled)
    config = BuildConfig(bundle, max_prefill=32, timing_cache=caches / "timing.cache")
    built = build_engine(config, target=target(gpu))
    assert built.built
    assert find_engines(bundle) == [built.directory]
    assert f"{caches / 'timing.cache'} is not kept: File exists" in caplog.text


def test_a_disk_that_is_full_once_the_engine_is_in_place_costs_no_engine(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(path: Path, data: Any) -> None:
        if (path.parent / "engine.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write_durably(path, data)

    config = BuildConfig(copied("portable", "fp16"), max_prefill=32)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_durably", fill)
        for built in (True, False):  # the second has an engine, and its layers to ask for
            result = build_engine(config, target=target(gpu))
            assert result.built is built
            assert result.info.compiled_unknown == (
                "they could not be written: No space left on device"
            )
    assert caplog.text.count("the engine's layers are not known: they could not be written") == 2
    (directory,) = find_engines(config.bundle)
    assert not read_engine_info(directory).compiled
    assert build_engine(config, target=target(gpu)).info.compiled
    assert read_engine_info(directory).compiled


def test_links_in_a_bundle_do_not_redirect_a_build(
    gpu: FakeGpu, copied: Any, tmp_path: Path
) -> None:
    config = BuildConfig(copied("portable", "fp16"), max_prefill=32)
    built = build_engine(config, target=target(gpu))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "old.tmp").write_text("my own")  # a sweep of an engine would remove it
    for name in ("engine.json", "build.log", built.info.plan):
        (built.directory / f".{name}.tmp").symlink_to(mine / "old.tmp")
    again = dataclasses.replace(config, again=True)
    assert build_engine(again, target=target(gpu)).built
    for directory in (built.directory, built.directory.parent):
        shutil.rmtree(directory)
        directory.symlink_to(mine)
        with pytest.raises(ConfigError, match=rf"{directory.name} is a symbolic link"):
            build_engine(config, target=target(gpu))
        directory.unlink()
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"old.tmp": "my own"}


def test_a_log_that_cannot_be_written_hides_no_reason(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_durably", full)
    here = target(gpu, planted=Planted(no_fused="no tactic for head_dim 16"))
    config = BuildConfig(copied("native", "int4"), max_prefill=32, attention="fused")
    with pytest.raises(BuildError, match="no tactic for head_dim 16"):
        build_engine(config, target=here)


def test_a_plan_of_another_size_than_tensorrt_for_rtx_gives_is_kept_with_a_warning(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = plan_of(copied("portable", "int4"))
    weights = build.manifest.files["decoder.onnx.data"].num_bytes
    here = target(gpu, "10.3.0.30")
    rtx = dataclasses.replace(here, rt=TensorRT(None, "tensorrt-rtx", "1.7.0.1"))
    assert variant.check_size(weights, build, rtx) == variant.check_size(weights, build, here)
    assert not caplog.records
    for size, words in ((4 * weights + 100_000_000, "were unpacked"), (1000, "less than")):
        (problem,) = variant.check_size(size, build, rtx)
        assert words in problem
        assert variant.check_size(size, build, here) == ()
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{problem}. That is compared with")
        assert "this is TensorRT 10.3.0.30" in record.getMessage()
        caplog.clear()
    monkeypatch.setattr(variant, "check_plan_bytes", lambda *_: ["the plan has 9 bytes"])
    assert build_engine(build.config, target=here).built
    assert "the plan has 9 bytes. That is compared" in caplog.text


def test_damaged_or_foreign_timings_are_ignored(gpu: FakeGpu, copied: Any) -> None:
    bundle = copied("portable", "fp16")

    def build(level: int, version: str = "10.16.2.10") -> TimingCache:
        config = BuildConfig(bundle, max_prefill=32, opt_level=level, timing_cache=cache)
        build_engine(config, target=target(gpu, version))
        found = TimingCache.read(cache.read_bytes())
        assert found is not None
        return found

    cache = bundle.parent / "timing.cache"
    cache.write_bytes(b"\0" * 100)
    assert build(1).entries == 1
    assert build(2).entries == 2  # it is read
    other = build(3, "10.15.1.2")
    assert (other.entries, other.owner) == (1, "10.15.1.2 8.7")


@pytest.mark.parametrize("kind", ["Builder", "Runtime"])
def test_a_tensorrt_that_does_not_start_says_why(
    kind: str, gpu: FakeGpu, tiny_bundles: Bundles, tmp_path: Path
) -> None:
    """As where its CUDA is newer than the driver (NVIDIA/TensorRT#2913)."""
    here = target(gpu)
    setattr(here.rt.module, kind, start_nothing)
    plan = tmp_path / "plan"
    plan.write_bytes(b"of any engine")
    build = plan_of(tiny_bundles("qwen2", "portable", "fp16"))
    work: dict[str, Callable[[], Any]] = {
        "Builder": lambda: compile_bundle(build, here),
        "Runtime": lambda: compat.inspect_plan(here.rt, plan.read_bytes(), 2),
    }
    with pytest.raises(BuildError, match=rf"10\.16\.2\.10 does not start: {NO_CUDA}; edge-llm doc"):
        work[kind]()


# Scratch memory


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_scratch_is_what_the_graph_needs_at_the_largest_shapes(
    dialect: str, gpu: FakeGpu, tiny_bundles: Bundles
) -> None:
    bundle = tiny_bundles("qwen2", dialect, "int4")

    def scratch(**sizes: int) -> dict[str, int]:
        return compile_bundle(plan_of(bundle, **sizes), target(gpu)).scratch_bytes

    found = scratch(max_batch=4, max_prefill=32)
    longer = scratch(max_batch=4, max_prefill=96)
    assert longer["decode"] == found["decode"]
    # Three times the tokens; scores of primitive operators grow with their square.
    assert 2.5 < longer["prefill"] / found["prefill"] < 9
    # A decode step has copies of the cache's rows, of every slot.
    wider = scratch(max_batch=8, max_prefill=32)
    assert wider["decode"] == pytest.approx(2 * found["decode"], rel=0.01)
    assert wider["prefill"] == found["prefill"]
    # What `plan` estimates for a chunk of a prompt is of this size.
    build = plan_of(bundle, max_batch=4, max_prefill=96)
    (prefill,) = (each for each in profile_limits(4, 96) if each.profile == "prefill")
    estimate = activation_bytes(build.manifest.model, build.manifest.dialect, [prefill], 128)
    assert 0.5 < longer["prefill"] / estimate < 2


def test_a_context_takes_the_scratch_of_the_largest_profile(
    gpu: FakeGpu, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied(RUNNABLE, "int4")
    install(monkeypatch, gpu)
    here = target(gpu, planted=Planted(unpacks=("lm_head",)))
    build_engine(BuildConfig(bundle, max_prefill=24), target=here)
    (directory,) = find_engines(bundle)
    log = (directory / "build.log").read_text()
    told = [int(size) for size in re.findall(r"Max Scratch Memory: (\d+) bytes", log)]
    plain = compile_bundle(plan_of(bundle, max_prefill=24), target(gpu)).scratch_bytes
    unpacked = 2 * np.prod(read_manifest(bundle).quantization.linears["lm_head"].shape)
    assert [size - unpacked for size in told] == [plain[name] for name in ("prefill", "decode")]
    with GpuRunner(bundle, gpu) as runner:
        engine: FakeEngine = runner.engine._engine._engine
        sizes = [engine.get_device_memory_size_for_profile_v2(i) for i in range(2)]
        assert sizes == told
        assert runner.engine.memory.activations_bytes == max(told)
        # All of it is written to.
        runner.step(random_ids(1, 24))
        held = gpu.memory(runner.engine._activations.address, max(told))
        assert (held == 0xAB).all()
    assert [each.unpacking for each in read_engine_info(directory).compiled] == [1, 1]


def test_a_workspace_that_is_too_small_is_named(gpu: FakeGpu, tiny_bundles: Bundles) -> None:
    build = plan_of(tiny_bundles("qwen2", "portable"), max_prefill=128, workspace_bytes=1 << 20)
    with pytest.raises(BuildError, match=r"Requested size was \d+ bytes.*give --workspace \d+M"):
        compile_bundle(build, target(gpu))
