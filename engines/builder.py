"""Turns a bundle into an engine: check hashes, parse, audit, compile, put in place."""

from __future__ import annotations

import datetime
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edge._version import __version__
from edge.backends.tensorrt.plugins import register_kernels
from edge.bundle.engine_file import (
    ENGINE_SCHEMA_VERSION,
    EngineInfo,
    Plugins,
    ProfileInfo,
    ShapeInfo,
    SkippedTactics,
    open_plan,
    read_engine_info,
    versions_agree,
)
from edge.bundle.manifest import ENGINES_DIR
from edge.bundle.trust import open_manifest, trusted_keys_file
from edge.bundle.verified_files import verify_files
from edge.device.gpu import Gpu, find_gpu
from edge.device.memory import read_available_memory_bytes
from edge.device.process import read_rss_peak_bytes, reset_rss_peak
from edge.errors import BackendError, BuildError, BundleError, ConfigError, DependencyError
from edge_lab import telemetry
from edge_lab.engine_layers import LayerTable, parse_inspector
from edge_lab.engine_record import check_recording
from edge_lab.progress import Progress, silent, uncounted

from . import compat, support
from .audit import Audit, audit_network, check_plan_bytes
from .build_plan import BuildPlan, plan_build
from .compat import Compiler, TensorRT
from .config import BuildConfig
from .encoder import compile_encoder, encoder_by_trtexec, source_files
from .graph import graph_files, graph_of, write_graph
from .ladder import Climbed, climb, describe, make_rungs, scales_to_try
from .memory import check_memory, make_memory_free
from .outside import PRODUCER, Outside
from .own_kernels import OwnGraph, use_own_kernels
from .profiles import Profile
from .progress import STEP
from .rules.bundle import refuse_illegal
from .rules.table import version_of
from .scratch import scratch_by_profile
from .skipped import CURE, skipped_tactics
from .store import TIMING_CACHE, TRTEXEC_SCRATCH, EncoderPlan, EngineStore, engine_key
from .trtexec import CrashError, find_trtexec, full_version, run_trtexec, trtexec_command

_log = logging.getLogger(__name__)

Via = Literal["api", "trtexec"]
CompileVariant = Callable[..., "tuple[Compiled, Climbed]"]
MakeEncoder = Callable[[Progress], "EncoderPlan | None"]
_LAYERS = "layers.json"


@dataclass(frozen=True)
class BuildResult:
    """An engine in its place.

    Attributes:
        directory: the engine's directory.
        info: its ``engine.json``.
        built: False if it was there already.
    """

    directory: Path
    info: EngineInfo
    built: bool


@dataclass(frozen=True)
class Target:
    """The TensorRT that builds an engine, and the GPU that it is built for."""

    rt: TensorRT
    gpu: Gpu | None
    compute_capability: str


def find_target(compute_capability: str | None = None, rt: TensorRT | None = None) -> Target:
    """Find TensorRT and the GPU to build for.

    Args:
        compute_capability: GPU to build for (``8.6``), even on a machine without one; needs
            TensorRT for RTX. None means this machine's GPU.
        rt: a TensorRT that is already loaded.

    Raises:
        DependencyError: no TensorRT, or no GPU where one is needed.
    """
    if rt is None:
        rt = compat.load("tensorrt-rtx" if compute_capability else None)
    gpu = find_gpu()
    if compute_capability is None:
        if gpu is None:
            raise DependencyError(
                "building an engine needs an NVIDIA GPU, and the CUDA driver finds none here; "
                "build on the device that will run it, or compile as a test with: "
                "edge-llm check BUNDLE"
            )
        compute_capability = gpu.compute_capability
    return Target(rt, gpu, compute_capability)


def build_engine(
    config: BuildConfig,
    *,
    target: Target | None = None,
    via: Via = "api",
    compile_variant: CompileVariant | None = None,
    progress: Progress = silent,
    on_line: Callable[[str], None] = lambda _line: None,
    waiting: Callable[[], None] = lambda: None,
) -> BuildResult:
    """Build the engine of a bundle, or return the one that is already there.

    Args:
        config: what to build.
        target: TensorRT and the GPU to build for; None finds this machine's.
        via: TensorRT's Python API, or NVIDIA's ``trtexec``, whose network cannot be audited.
        compile_variant: compiles one of the variants that the options leave open; by default the
            first that builds (`compile_ladder`). It must be `tune.compile_fastest` if
            ``config.measures``.
        progress: called in each step: hashing, parsing and compiling, or ``trtexec``.
        on_line: called with each line of ``trtexec``.
        waiting: called if another build holds the bundle's lock.

    Raises:
        ConfigError: options do not fit the model; or this machine trusts keys, and no record of
            the engine can be written.
        IntegrityError: a file of the bundle is damaged.
        ResourceError: there is too little memory or disk.
        DependencyError: there is no TensorRT, it is too old, or there is no GPU.
        BuildError: TensorRT refused the graph, failed, or changed what the graph computes.
    """
    if compile_variant is None:
        if config.measures:
            raise ConfigError(
                "a build with tune, or with kernels auto, needs "
                "compile_variant=engines.tune.compile_fastest"
            )
        compile_variant = compile_ladder
    build = plan_build(config, open_manifest(config.bundle))
    if trusted_keys_file() is not None:
        check_recording()  # an engine without a record would not run, and a build takes long
    target = target or find_target(rt=_trtexec_target() if via == "trtexec" else None)
    support.check_support(
        target.rt.flavour, target.rt.version, build.manifest.dialect, build.kv_read
    )
    if build.kernels == "own":
        if via == "trtexec":
            raise ConfigError(
                "--kernels own needs the Python API, which trtexec does not go through; build with "
                "it, or leave the option out"
            )
        support.check_own_kernels(target.rt.flavour, target.rt.version, target.compute_capability)
    make_encoder: MakeEncoder = functools.partial(
        compile_encoder, build, target.rt, target.compute_capability
    )
    if via == "trtexec":
        compile_variant = functools.partial(_climb_with_trtexec, on_line=on_line)
        make_encoder = functools.partial(encoder_by_trtexec, build, target.rt, on_line)
    key = engine_key({**_key_parts(build, target), "via": via})
    store = EngineStore(config.bundle, engine_name(build, target), config.timing_cache)
    order = _Order(build, target, via, key, store)
    with order.store.locked(waiting):
        return _found(order) or _built(order, compile_variant, make_encoder, progress)


@dataclass(frozen=True)
class _Order:
    """A build that is decided: what its steps need while they hold the bundle's engine lock.

    Attributes:
        build: the plan of the build.
        target: TensorRT and the GPU to build for.
        via: TensorRT's Python API or ``trtexec``.
        key: hash of everything that the engine depends on.
        store: store that the engine goes into.
    """

    build: BuildPlan
    target: Target
    via: Via
    key: str
    store: EngineStore


def _found(order: _Order) -> BuildResult | None:
    """Find an engine that is already built, and add its layer table if it has none yet."""
    target, store = order.target, order.store
    found = None if order.build.config.again else store.find(order.key)
    if found is None:
        return None
    unknown_here = not found.compiled and target.gpu is not None and order.via == "api"
    if unknown_here and store.is_recorded():
        layers, unknown = read_compiled_layers(target, store.directory, found)
        found = store.add_layers(found, layers, unknown)
    return BuildResult(store.directory, found, built=False)


def _built(
    order: _Order, compile_variant: CompileVariant, make_encoder: MakeEncoder, progress: Progress
) -> BuildResult:
    """Compile the engine and put it in place."""
    build, target, store = order.build, order.target, order.store
    if not build.config.force:
        workspace = build.config.workspace_bytes if target.gpu else 0
        available, release = read_available_memory_bytes(), _release(target)
        check_memory(build.manifest, workspace, available, release, build.kernels)
    timings = store.read_timings() if order.via == "api" else _timings_of_this_gpu(order)
    compiled, climbed = compile_variant(
        build, target, timings=timings, progress=progress, keep_log=store.write_log
    )
    encoder = make_encoder(progress)
    if problems := compiled.audit.problems + (encoder.problems if encoder else ()):
        raise BuildError(
            f"TensorRT {target.rt.version} made another network of {build.config.bundle}: "
            f"{'; '.join(problems[:3])}; the old engine, if any, is kept. Please report this"
        )
    if compiled.timings is not None:
        store.write_timings(compiled.timings)
    recorder = make_recorder(climbed, target, order.via, order.key, compiled)
    info = store.commit(compiled.plan, recorder, compiled.outside, encoder)
    if info.skipped_tactics is not None:
        slower = "%s; the engine may be slower than it could be: %s, then build with --again"
        _log.warning(slower, info.skipped_tactics, CURE)
    exported = compiled.exported_layers
    del compiled, encoder  # the plan would be in memory twice
    if order.via == "trtexec":
        layers, unknown = read_exported_layers(exported, build)
    else:
        layers, unknown = read_compiled_layers(target, store.directory, info)
    info = store.add_layers(info, layers, unknown)
    return BuildResult(store.directory, info, built=True)


def _release(target: Target) -> tuple[int, int] | None:
    """Return TensorRT's release as memory estimates take it; None means TensorRT for RTX."""
    return target.rt.release if target.rt.flavour == "tensorrt" else None


def read_compiled_layers(
    target: Target, directory: Path, info: EngineInfo
) -> tuple[LayerTable | None, str | None]:
    """Ask TensorRT's engine inspector what a plan consists of.

    Args:
        target: TensorRT and GPU that the plan was built with.
        directory: the engine's directory.
        info: its ``engine.json``.

    Returns:
        The table of layers; or None and the reason why it is unknown.
    """
    if target.gpu is None:
        return None, "it was compiled without a GPU, and TensorRT opens a plan on its GPU only"
    try:
        with open_plan(directory, info) as plan:
            register_kernels(target.rt.module, info)
            texts = compat.inspect_plan(target.rt, plan, len(info.profiles))
        return parse_inspector(texts, [profile.name for profile in info.profiles]), None
    except (BuildError, BundleError, DependencyError) as error:
        reason = str(error)  # keep no error: its frames hold the loaded engine
        _log.warning("the engine's layers are not known: %s", reason)
        return None, reason


def read_exported_layers(
    text: str | None, build: BuildPlan
) -> tuple[LayerTable | None, str | None]:
    """Read the layers that ``trtexec`` wrote.

    ``trtexec`` asks the same inspector, but without an execution context. A TensorRT that shows
    later profiles only in a context therefore shows just the first one here.

    Returns:
        The table of layers; or None and the reason why it is unknown.
    """
    if text is None:
        return None, "trtexec wrote no table of layers"
    try:
        return parse_inspector([text], [profile.name for profile in build.profiles]), None
    except BundleError as error:
        _log.warning("the engine's layers are not known: %s", error)
        return None, str(error)


def make_recorder(
    climbed: Climbed, target: Target, via: Via, key: str, compiled: Compiled
) -> Callable[[str, int, str], EngineInfo]:
    """Make the ``engine.json`` of a build; its file's name, size and SHA-256 come last."""
    build = climbed.build
    shapes, files = build.shapes, build.manifest.files
    board = telemetry.read_snapshot()
    low, high = board.gpu_clock_min_hz, board.gpu_clock_max_hz

    def record(name: str, num_bytes: int, sha256: str) -> EngineInfo:
        return EngineInfo(
            schema_version=ENGINE_SCHEMA_VERSION,
            producer=PRODUCER,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            key=key,
            plan=name,
            plan_bytes=num_bytes,
            plan_sha256=sha256,
            flavour=target.rt.flavour,
            tensorrt_version=compiled.tensorrt_version,
            compute_capability=target.compute_capability,
            device=target.gpu.name if target.gpu else None,
            num_sms=target.gpu.num_sms if target.gpu else None,
            jetpack=board.jetpack,
            l4t=board.l4t,
            power_mode=board.power_mode,
            gpu_clocks_hz=None if low is None or high is None else (low, high),
            sources={file: files[file].sha256 for file in source_files(build.manifest)},
            max_batch=shapes.max_batch,
            max_prefill=shapes.max_prefill,
            kv_capacity=shapes.capacity,
            kv_buckets=shapes.kv_buckets,
            kv_read=build.kv_read,
            options=climbed.options,
            profiles=tuple(_profile_info(profile) for profile in build.profiles),
            builder=via,
            build_s=round(compiled.build_s, 3),
            peak_memory_bytes=compiled.peak_memory_bytes,
            weights=compiled.audit.weights,
            layers=compiled.audit.layers,
            attention=build.attention if via == "api" else None,
            refused=climbed.refused,
            tuned=climbed.tuned,
            scales=build.scales,
            best_logits=shapes.best_logits,
            kernels=build.kernels,
            own_linears=compiled.own_linears,
            left_linears=compiled.left_linears,
            plugins=compiled.plugins,
            python_kernels=compiled.python_kernels,
            own_attentions=compiled.own_attentions,
            own_top_k=compiled.own_top_k,
            skipped_tactics=compiled.skipped_tactics,
            compiled_unknown="the build was ended before it read them",
        )

    return record


@dataclass(frozen=True)
class Compiled:
    """A compiled plan that is not yet written to a file, and what was seen on the way.

    Attributes:
        plan: the plan, a buffer.
        timings: TensorRT's timing cache, or None.
        audit: audit of the parsed network and of the plan's size.
        scratch_bytes: scratch memory of each profile by name; empty if TensorRT did not say.
        build_s: seconds of parsing and compiling.
        peak_memory_bytes: highest resident memory; None if it was not measured.
        own_linears: linear layers that own kernels compute.
        left_linears: linear layers, attentions and `own_top_k.TOP_K` that own kernels were asked to
            compute and do not, each with the reason.
        own_attentions: attentions that own kernels compute.
        own_top_k: whether own kernels find the best logits.
        plugins: kind of plugin that the own kernels are.
        python_kernels: the own kernels themselves, unless they are compiled into the plan.
        skipped_tactics: kernels that TensorRT did not try for lack of memory.
        outside: weights that go into a file beside the plan; none of them is read yet.
    """

    plan: Any
    plan_bytes: int
    tensorrt_version: str
    timings: bytes | None
    audit: Audit
    build_s: float
    peak_memory_bytes: int | None
    scratch_bytes: dict[str, int] = field(default_factory=dict)
    exported_layers: str | None = None
    own_linears: tuple[str, ...] = ()
    left_linears: dict[str, str] = field(default_factory=dict)
    own_attentions: tuple[str, ...] = ()
    own_top_k: bool = False
    plugins: Plugins | None = None
    python_kernels: tuple[bytes, ...] = ()
    skipped_tactics: SkippedTactics | None = None
    outside: Outside | None = None


def compile_ladder(
    asked: BuildPlan,
    target: Target,
    *,
    timings: bytes | None = None,
    progress: Progress = silent,
    keep_log: Callable[[str], None] = lambda _text: None,
) -> tuple[Compiled, Climbed]:
    """Compile what was asked for; where it leaves a choice, take the first variant that builds.

    Args:
        asked: plan from `plan_build`.
        target: TensorRT and the GPU to build for.
        timings: timing cache.
        progress: called in the steps of `compile_bundle`, again for each variant.
        keep_log: called with the log of all variants so far.

    Raises:
        DependencyError: TensorRT is too old for what was asked.
        IntegrityError: a file of the bundle is damaged.
        BuildError: no variant could be built.
    """
    rungs = make_rungs(asked, target.rt)
    logs: list[str] = []

    def attempt(rung: BuildPlan) -> Compiled:
        def keep(text: str) -> None:
            logs.append(f"== {describe(rung)}\n{text}" if len(rungs) > 1 else text)
            keep_log("".join(logs))

        try:
            return compile_bundle(rung, target, timings=timings, progress=progress, keep_log=keep)
        except BuildError as error:  # a plugin's failure is not in TensorRT's log
            logs.append(f"refused: {error}\n")
            keep_log("".join(logs))
            raise

    return climb(asked, rungs, attempt)


def compile_bundle(
    build: BuildPlan,
    target: Target,
    *,
    timings: bytes | None = None,
    progress: Progress = silent,
    keep_log: Callable[[str], None] = lambda _text: None,
) -> Compiled:
    """Check the bundle's hashes, parse it, audit the network and compile it.

    A network that fails the audit is still compiled; the caller reports the faults.

    Raises:
        IntegrityError: a file of the bundle is damaged.
        DependencyError: own kernels are asked for, and this TensorRT cannot use them.
        BuildError: the graph breaks a rule of this TensorRT (`rules`); TensorRT refused it or
            failed; or own kernels can compute nothing in it.
    """
    config, manifest = build.config, build.manifest
    kernels_bytes, plugins = 0, None
    if build.kernels == "own":
        support.check_own_kernels(target.rt.flavour, target.rt.version, target.compute_capability)
        plugins = compat.plugins_of(target.rt, config.plugins)
        kernels_bytes = compat.register_own_kernels(target.rt, target.compute_capability, plugins)
    with uncounted(progress, "hash"):
        verify_files(config.bundle, manifest, graph_files(manifest))
    graph = graph_of(build)
    lines = _refuse_illegal(build, target, graph)

    def log(severity: str, message: str) -> None:
        lines.append(f"{severity}: {message}")
        _log.debug("%s: %s", severity, message)

    reset_rss_peak()
    started = time.perf_counter()
    try:
        found = parsed_graph(build, graph, plugins)
        outside = found.outside.tensors if found.outside else {}
        for name, reason in found.left.items():
            log("info", f"own kernels leave {name} to TensorRT: {reason}")
        compiler = Compiler(target.rt, log)
        release = _release(target)
        read, workspace = [config.bundle], config.workspace_bytes
        make_memory_free(read, manifest, workspace, release, build.kernels)
        with uncounted(progress, "parse"):
            network = compiler.parse(found.data, found.path, build.kv_read, build.attention)
        audit = audit_network(
            network,
            manifest,
            build.shapes,
            build.kv_read,
            found.linears,
            found.attentions,
            found.top_k,
            outside,
        )
        # A parser that maps the weights still needs them; TensorRT 10.3 has copied them.
        make_memory_free(read, manifest, workspace, release, build.kernels)
        progress(STEP, 0, 1)  # TensorRT may work for a while before it names a phase
        plan, written = compiler.build(
            build.profiles,
            workspace_bytes=config.workspace_bytes,
            opt_level=config.opt_level,
            timings=timings,
            compute_capability=target.compute_capability,
            progress=progress,
        )
    except BuildError as error:
        if (skipped := skipped_tactics(lines)) is None:
            raise
        raise BuildError(f"{error}; {skipped}: {CURE}", error.cause) from error
    finally:
        keep_log("\n".join(lines) + "\n")
    kernels_bytes *= len(found.linears) + 2 * (len(found.attentions) + found.top_k)
    size_problems = _check_size(plan.nbytes, build, target, kernels_bytes, found.linears)
    return Compiled(
        plan,
        plan.nbytes,
        target.rt.version,
        written,
        Audit(audit.problems + size_problems, audit.weights, audit.layers, audit.attentions),
        time.perf_counter() - started,
        read_rss_peak_bytes(),
        scratch_by_profile(lines, build.profiles),
        own_linears=found.linears,
        left_linears=found.left,
        plugins=plugins,
        python_kernels=compat.pack_own_kernels(target.rt, found.plugins)
        if plugins == "python"
        else (),
        own_attentions=found.attentions,
        own_top_k=found.top_k,
        skipped_tactics=skipped_tactics(lines),
        outside=found.outside,
    )


def _check_size(
    plan_bytes: int,
    build: BuildPlan,
    target: Target,
    kernels_bytes: int = 0,
    own_linears: Sequence[str] = (),
) -> tuple[str, ...]:
    """Find faults in a plan's size; errors with TensorRT for RTX, warnings with any other."""
    num_profiles = len(build.profiles)
    found = check_plan_bytes(plan_bytes, build.manifest, num_profiles, kernels_bytes, own_linears)
    if target.rt.flavour == "tensorrt-rtx":
        return tuple(found)
    for problem in found:
        _log.warning(
            "%s. That is compared with what plans of TensorRT for RTX have, and this is TensorRT "
            "%s, which may pack them otherwise: the engine is kept; edge-llm inspect shows its "
            "layers, edge-llm bench its speed",
            problem,
            target.rt.version,
        )
    return ()


def parsed_graph(build: BuildPlan, graph: bytes, plugins: Plugins | None = None) -> OwnGraph:
    """Return the graph that is parsed, with the own kernels that were asked for."""
    bundle, manifest = build.config.bundle.resolve(), build.manifest
    if build.kernels == "tensorrt":
        return OwnGraph(graph, bundle / manifest.graphs.decoder, (), {})
    attention = build.attention == "own"
    return use_own_kernels(graph, manifest, bundle, plugins or "compiled", attention=attention)


def _refuse_illegal(build: BuildPlan, target: Target, graph: bytes) -> list[str]:
    """Check the graph by the rules, before any parser; return lines for the log."""
    version = version_of(target.rt.flavour, target.rt.release)
    warnings = refuse_illegal(graph, build.config.bundle, build.manifest, version)
    return [f"warning: {line}" for line in warnings]


def _trtexec_target() -> TensorRT:
    """Describe the TensorRT of ``trtexec`` without importing it."""
    return TensorRT(None, "tensorrt", full_version(find_trtexec()))


def _climb_with_trtexec(
    asked: BuildPlan,
    target: Target,
    *,
    timings: bytes | None,
    progress: Progress,
    keep_log: Callable[[str], None],
    on_line: Callable[[str], None],
) -> tuple[Compiled, Climbed]:
    """Build with the scales as stored, else in FP32; ``trtexec`` decides everything else."""
    with uncounted(progress, "hash"):
        verify_files(asked.config.bundle, asked.manifest, graph_files(asked.manifest))
    config = asked.config
    make_memory_free([config.bundle], asked.manifest, config.workspace_bytes, _release(target))
    log: list[str] = []

    def keep(line: str) -> None:
        log.append(line)
        on_line(line)

    def attempt(rung: BuildPlan) -> Compiled:
        try:
            return _compile_with_trtexec(rung, target, timings, keep, progress)
        except BackendError as error:
            raise BuildError(str(error)) from error
        finally:
            keep_log("\n".join(log) + "\n")

    rungs = [replace(asked, scales=scales) for scales in scales_to_try(asked)]
    return climb(asked, rungs, attempt)


def _timings_of_this_gpu(order: _Order) -> bytes | None:
    """Return this GPU's timing cache: ``trtexec`` would take any GPU's (``ignoreMismatch``)."""
    file, gpu = order.build.config.timing_cache, order.target.gpu
    timings = order.store.read_timings()
    if timings is None:
        return None
    if file is not None:
        _log.warning(
            "trtexec takes the timings in %s for this GPU's in this power mode, whosever they "
            "are; build without --with trtexec where they may be of another",
            file,
        )
        return timings
    try:
        last = read_engine_info(order.store.directory, trusted_keys_file())
    except BundleError:
        return None
    here = (gpu.name, gpu.num_sms) if gpu else (None, None)
    same = versions_agree(last.tensorrt_version, order.target.rt.version)
    return timings if same and (last.device, last.num_sms) == here else None


def _compile_with_trtexec(
    build: BuildPlan,
    target: Target,
    timings: bytes | None,
    keep: Callable[[str], None],
    progress: Progress,
) -> Compiled:
    engines = build.config.bundle / ENGINES_DIR
    with tempfile.TemporaryDirectory(prefix=TRTEXEC_SCRATCH, dir=engines) as scratch:
        graph = write_graph(build, Path(scratch))
        plan, layers = Path(scratch) / "engine.plan", Path(scratch) / _LAYERS
        cache = Path(scratch) / TIMING_CACHE  # a copy: trtexec writes it in place
        if timings is not None:
            cache.write_bytes(timings)
        argv = trtexec_command(
            build,
            target.rt.release,
            onnx=graph,
            plan=plan,
            timing_cache=cache,
            layers=layers,
        )
        for warning in _refuse_illegal(build, target, graph.read_bytes()):
            keep(warning)
        keep(" ".join(argv))
        said: list[str] = []

        def hear(line: str) -> None:
            said.append(line)
            keep(line)

        with uncounted(progress, "trtexec"):
            try:
                result = run_trtexec(argv, hear)
            except CrashError as error:
                if timings is None:
                    raise
                keep(f"{error}\nonce more, without the timing cache")
                cache.unlink(missing_ok=True)
                said.clear()
                result = run_trtexec(argv, hear)
        data = plan.read_bytes()
        exported = layers.read_text("utf-8", "replace") if layers.is_file() else None
        timings = cache.read_bytes() if cache.is_file() else None
    return Compiled(
        data,
        len(data),
        result.version or target.rt.version,
        timings,
        Audit(_check_size(len(data), build, target), (), (), 0),
        result.build_s if result.build_s is not None else result.seconds,
        result.peak_host_bytes,
        exported_layers=exported,
        skipped_tactics=skipped_tactics(said),
    )


def engine_name(build: BuildPlan, target: Target) -> str:
    """Name the directory of an engine, e.g. ``sm87-trt10.16-int4-b1-kv4096``."""
    parts = [
        f"sm{target.compute_capability.replace('.', '')}",
        target.rt.label,
        build.manifest.quantization.name,
        f"b{build.shapes.max_batch}",
        f"kv{build.shapes.capacity}",
    ]
    if build.config.kv_read != "slice":
        parts.append(build.config.kv_read)
    if build.config.attention != "auto":
        parts.append(build.config.attention)
    if build.config.kernels != "tensorrt":
        parts.append(f"{build.config.kernels}-kernels")
    if build.config.plugins != "auto":
        parts.append(f"{build.config.plugins}-plugins")
    if build.shapes.best_logits:
        parts.append(f"best{build.shapes.best_logits}")
    return "-".join(parts)


def _key_parts(build: BuildPlan, target: Target) -> dict[str, Any]:
    files = build.manifest.files
    return {
        "producer": __version__,  # how the graph is edited may change with it
        "sources": {name: files[name].sha256 for name in source_files(build.manifest)},
        "flavour": target.rt.flavour,
        "tensorrt": target.rt.version,
        "compute_capability": target.compute_capability,
        "device": target.gpu.name if target.gpu else None,
        "num_sms": target.gpu.num_sms if target.gpu else None,  # kernels are timed for them
        "capacity": build.shapes.capacity,
        "buckets": build.shapes.kv_buckets,
        "options": build.rebuild_options(),
    }


def _profile_info(profile: Profile) -> ProfileInfo:
    return ProfileInfo(
        profile.name,
        {
            name: ShapeInfo(shape.min, shape.opt, shape.max)
            for name, shape in profile.inputs.items()
        },
    )
