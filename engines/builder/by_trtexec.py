"""Compiles an engine by NVIDIA's ``trtexec``, whose network cannot be audited."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edge.bundle.engine_file import read_engine_info, versions_agree
from edge.bundle.manifest import ENGINES_DIR
from edge.bundle.trust import trusted_keys_file
from edge.bundle.verified_files import verify_files
from edge.errors import BackendError, BuildError, BundleError
from edge_make.progress import Progress, uncounted
from engines.build_plan import BuildPlan
from engines.compiler.compat import TensorRT
from engines.compiler.skipped_tactics import skipped_tactics
from engines.graph.adapt import graph_files, write_graph
from engines.trtexec.command import (
    CrashError,
    find_trtexec,
    full_version,
    run_trtexec,
    trtexec_command,
)

from .audit import Audit
from .fallbacks import Climbed, climb, scales_to_try
from .memory import make_memory_free
from .store import TIMING_CACHE, TRTEXEC_SCRATCH, EngineStore
from .target import Target
from .variant import Compiled, check_size, warn_of_rules

_log = logging.getLogger(__name__)


def trtexec_target() -> TensorRT:
    """Describe the TensorRT of ``trtexec`` without importing it."""
    return TensorRT(None, "tensorrt", full_version(find_trtexec()))


def compile_with_trtexec(
    asked: BuildPlan,
    target: Target,
    *,
    timings: bytes | None,
    progress: Progress,
    keep_log: Callable[[str], None],
    say: Callable[[str], None],
) -> tuple[Compiled, Climbed]:
    """Build with the scales as stored, else in FP32; ``trtexec`` decides everything else."""
    with uncounted(progress, "hash"):
        verify_files(asked.config.bundle, asked.manifest, graph_files(asked.manifest))
    config = asked.config
    make_memory_free([config.bundle], asked.manifest, config.workspace_bytes, target.memory_release)
    log: list[str] = []

    def keep(line: str) -> None:
        log.append(line)
        say(line)

    def attempt(rung: BuildPlan) -> Compiled:
        try:
            return _compile_with_trtexec(rung, target, timings, keep, progress)
        except BackendError as error:
            raise BuildError(str(error)) from error
        finally:
            keep_log("\n".join(log) + "\n")

    rungs = [replace(asked, scales=scales) for scales in scales_to_try(asked)]
    return climb(asked, rungs, attempt)


def timings_of_this_gpu(build: BuildPlan, target: Target, store: EngineStore) -> bytes | None:
    """Return this GPU's timing cache: ``trtexec`` would take any GPU's (``ignoreMismatch``)."""
    file, gpu = build.config.timing_cache, target.gpu
    timings = store.read_timings()
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
        last = read_engine_info(store.directory, trusted_keys_file())
    except BundleError:
        return None
    here = (gpu.name, gpu.num_sms) if gpu else (None, None)
    same = versions_agree(last.tensorrt_version, target.rt.version)
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
        plan, layers = Path(scratch) / "engine.plan", Path(scratch) / "layers.json"
        cache = Path(scratch) / TIMING_CACHE  # a copy: trtexec writes it in place
        if timings is not None:
            cache.write_bytes(timings)
        argv = trtexec_command(
            build, target.rt.release, onnx=graph, plan=plan, timing_cache=cache, layers=layers
        )
        for warning in warn_of_rules(build, target, graph.read_bytes()):
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
        Audit(check_size(len(data), build, target), (), (), 0),
        result.build_s if result.build_s is not None else result.seconds,
        result.peak_host_bytes,
        exported_layers=exported,
        skipped_tactics=skipped_tactics(said),
    )
