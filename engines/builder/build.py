"""Turns a bundle into an engine: check hashes, parse, audit, compile, put in place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.bundle.engine_file import EngineInfo
from edge.bundle.trust import open_manifest, trusted_keys_file
from edge.device.memory import read_available_memory_bytes
from edge.errors import BuildError, ConfigError
from edge_make.engine_record import check_recording
from edge_make.progress import Progress, silent
from engines.build_plan import BuildPlan, plan_build
from engines.compiler import support
from engines.compiler.advice import what_auto_takes
from engines.compiler.skipped_tactics import CURE
from engines.config import BuildConfig

from .by_trtexec import compile_with_trtexec, timings_of_this_gpu, trtexec_target
from .encoder import compile_encoder, encoder_by_trtexec
from .fallbacks import Climbed, compile_first
from .memory import check_memory
from .record import (
    Via,
    engine_name,
    key_parts,
    make_recorder,
    read_compiled_layers,
    read_exported_layers,
)
from .store import EngineStore, engine_key
from .target import Target, find_target
from .variant import Compiled

_log = logging.getLogger(__name__)


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


def build_engine(
    config: BuildConfig,
    *,
    target: Target | None = None,
    via: Via = "api",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _line: None,
) -> BuildResult:
    """Build the engine of a bundle, or return the one that is already there.

    If the options leave variants open, the first that builds is taken. If they ask for a
    measurement (``config.measures``), variants run here and the fastest is taken.

    Args:
        config: what to build.
        target: TensorRT and the GPU to build for; None finds this machine's.
        via: TensorRT's Python API, or NVIDIA's ``trtexec``, whose network cannot be audited.
        progress: called in each step: hashing, parsing and compiling, or ``trtexec``.
        say: called with lines for the user: that another build is waited for, how long a
            measurement takes, and what ``trtexec`` prints.

    Raises:
        ConfigError: options do not fit the model, or each other; or this machine trusts keys, and
            no record of the engine can be written.
        IntegrityError: a file of the bundle is damaged.
        ResourceError: there is too little memory or disk.
        DependencyError: there is no TensorRT, it is too old, or there is no GPU.
        BuildError: TensorRT refused the graph, failed, or changed what the graph computes.
    """
    build = plan_build(config, open_manifest(config.bundle))
    if trusted_keys_file() is not None:
        check_recording()  # an engine without a record would not run, and a build takes long
    target = target or find_target(rt=trtexec_target() if via == "trtexec" else None)
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
    key = engine_key({**key_parts(build, target), "via": via})
    store = EngineStore(config.bundle, engine_name(build, target), config.timing_cache)
    order = _Order(build, target, via, key, store)
    with store.locked(lambda: say("another build of this bundle is running: waiting")):
        return _found(order) or _built(order, progress, say)


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


def _built(order: _Order, progress: Progress, say: Callable[[str], None]) -> BuildResult:
    """Compile the engine and put it in place."""
    build, target, store = order.build, order.target, order.store
    if not build.config.force:
        workspace = build.config.workspace_bytes if target.gpu else 0
        available, release = read_available_memory_bytes(), target.memory_release
        check_memory(build.manifest, workspace, available, release, build.kernels)
    compiled, climbed = _compiled(order, progress, say)
    if order.via == "trtexec":
        encoder = encoder_by_trtexec(build, target.rt, say, progress)
    else:
        encoder = compile_encoder(build, target.rt, target.compute_capability, progress)
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


def _compiled(
    order: _Order, progress: Progress, say: Callable[[str], None]
) -> tuple[Compiled, Climbed]:
    """Compile the decoder in the way that the options ask for."""
    build, target, store = order.build, order.target, order.store
    if order.via == "trtexec":
        timings = timings_of_this_gpu(build, target, store)
        return compile_with_trtexec(
            build, target, timings=timings, progress=progress, keep_log=store.write_log, say=say
        )
    compile_variant = compile_first
    if build.config.measures:
        from .tune import compile_fastest  # it runs what it builds, which loads the runtime

        if not build.config.tune:
            say(what_auto_takes(build.manifest))
        compile_variant = compile_fastest
    timings = store.read_timings()
    return compile_variant(
        build, target, timings=timings, progress=progress, keep_log=store.write_log
    )
