"""``edge-llm build --tune`` and ``--kernels auto``: build, time here, keep the fastest right one.

A variant is a rung of `fallbacks`. ``--tune`` tries all of them; ``--kernels auto`` tries, for each
kind of kernels, the first one that builds and answers right. Each goes into a directory of its own
that no reader of engines sees. It is compared with the graph on the CPU, and its decode is timed
through the runner that will run it.
"""

from __future__ import annotations

import logging
import math
import mmap
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from edge.backends.ort.cpu import OrtBackend
from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.engine_file import RefusedRung, TunedRung, read_engine_info
from edge.bundle.manifest import ENGINES_DIR
from edge.bundle.verified_files import verify_files
from edge.errors import BackendError, BuildError, DependencyError, ResourceError
from edge_lab.measure.bench import BenchConfig, run_bench
from edge_lab.measure.verify import compare_backends, default_thresholds
from edge_make.progress import Progress, silent
from engines.build_plan import BuildPlan

from .fallbacks import Climbed, describe, make_rungs, refused_rung
from .record import make_recorder
from .store import TUNE_SCRATCH, EngineStore
from .target import Target
from .variant import Compiled, compile_bundle

_log = logging.getLogger(__name__)

_PROMPT_TOKENS, _OUTPUT_TOKENS, _REPEATS = 256, 33, 3
_VERIFY_TOKENS, _VERIFY_STEPS = (1, 24, 64), 8
_ANSWER_STEPS = 256
"""Decode steps to count per prefill when speeds are compared: reasoning models answer at length."""


class Measured(NamedTuple):
    """Speed and answers of a variant on the device.

    Attributes:
        decode_s: median seconds of a decode step of all slots; None if it is not timed.
        problem: what is wrong with its answers; None if nothing is.
        prefill_s: median seconds of a prompt of 256 tokens, or as many as the cache has room for.
    """

    decode_s: float | None
    problem: str | None
    prefill_s: float | None = None


@dataclass
class _Candidate:
    rung: BuildPlan
    compiled: Compiled
    directory: Path
    found: TunedRung

    @property
    def answer_s(self) -> float:
        """Seconds of a prompt and its answer; infinite if the variant is unusable."""
        if self.found.decode_s is None:
            return math.inf
        return (self.found.prefill_s or 0.0) + _ANSWER_STEPS * self.found.decode_s


def compile_fastest(
    asked: BuildPlan,
    target: Target,
    *,
    timings: bytes | None = None,
    progress: Progress = silent,
    keep_log: Callable[[str], None] = lambda _text: None,
) -> tuple[Compiled, Climbed]:
    """Compile variants of what was asked for, and return the fastest that answers right.

    Args:
        asked: plan from `plan_build`.
        target: TensorRT and the GPU, which must be this machine's.
        timings: timing cache, which later variants extend.
        progress: called in the steps of each variant: hashing, parsing, compiling, comparing,
            timing.
        keep_log: called with the log of all variants so far.

    Raises:
        DependencyError: TensorRT is too old, or the runner of engines is missing a package.
        IntegrityError: a file of the bundle is damaged.
        BuildError: no variant was built and answered right; the message has every reason.
    """
    root = asked.config.bundle / ENGINES_DIR
    verify_files(asked.config.bundle, asked.manifest)
    refused: list[RefusedRung] = []
    tuned: list[TunedRung] = []
    best: _Candidate | None = None
    logs: list[str] = []
    try:
        for number, rung in enumerate(make_rungs(asked, target.rt)):
            if not asked.config.tune and any(
                each.kernels == rung.kernels and each.problem is None for each in tuned
            ):
                continue

            def keep(text: str, rung: BuildPlan = rung) -> None:
                logs.append(f"== {describe(rung)}\n{text}")
                keep_log("".join(logs))

            try:
                compiled = compile_bundle(
                    rung, target, timings=timings, progress=progress, keep_log=keep
                )
            except BuildError as error:
                refused.append(refused_rung(rung, error))
                continue
            except DependencyError as error:
                if asked.kernels == rung.kernels:
                    raise
                refused.append(refused_rung(rung, error))  # this TensorRT cannot use own kernels
                continue
            timings = compiled.timings or timings
            store = EngineStore(rung.config.bundle, f"{TUNE_SCRATCH}{number}")
            problem = _put(rung, compiled, target, store)
            # The plan is in its file. In memory as well, beside a loaded engine or a builder, it
            # would not fit on a Jetson.
            compiled = replace(compiled, plan=b"")
            tried = _try(rung, compiled, store.directory, problem, progress)
            tuned.append(tried.found)
            if tried.answer_s < (math.inf if best is None else best.answer_s):
                best = tried
            _sweep(root, best)
        chosen = _choose(asked, best, tuple(tuned), tuple(refused), timings)
    except BaseException:
        _sweep(root)
        raise
    # Weights outside the plan are linked from the kept variant; a plan would take its room twice.
    _sweep(root, best if chosen[0].outside is not None else None)
    return chosen


def _sweep(root: Path, keep: _Candidate | None = None) -> None:
    for leftover in root.glob(f"{TUNE_SCRATCH}*"):
        if keep is None or leftover != keep.directory:
            shutil.rmtree(leftover)


def _put(rung: BuildPlan, compiled: Compiled, target: Target, store: EngineStore) -> str | None:
    """Put a variant where it can be loaded; return what is wrong with it."""
    if compiled.audit.problems:
        return "; ".join(compiled.audit.problems[:3])
    describe_engine = make_recorder(Climbed(rung, (), {}), target, "api", TUNE_SCRATCH, compiled)
    try:
        store.commit(compiled.plan, describe_engine, compiled.outside)
    except ResourceError as error:
        return str(error)
    return None


def _try(
    rung: BuildPlan, compiled: Compiled, directory: Path, problem: str | None, progress: Progress
) -> _Candidate:
    """Compare and time a variant that has no problem yet."""
    measured = Measured(None, problem)
    if problem is None:
        try:
            measured = Measured(*measure(rung, directory, progress))
        except (BackendError, ResourceError) as error:
            measured = Measured(None, str(error))
    found = TunedRung(
        rung.kv_read,
        rung.attention,
        measured.decode_s,
        measured.problem,
        rung.scales,
        rung.kernels,
        measured.prefill_s,
    )
    _log.info("%s: %s", describe(found), measured)
    return _Candidate(rung, compiled, directory, found)


def measure(rung: BuildPlan, directory: Path, progress: Progress = silent) -> Measured:
    """Compare an engine with the graph on the CPU, and time it unless it answers wrong.

    Raises:
        BackendError, DeviceMemoryError: the engine does not load or run.
        DependencyError: a package that runs engines is missing.
    """
    bundle, manifest = rung.config.bundle, rung.manifest
    batch = rung.shapes.max_batch
    with ExitStack() as stack:
        table = stack.enter_context(closing(EmbeddingTable(bundle / EMBEDDINGS_NAME)))
        engine = TensorRTBackend(bundle, manifest, directory, num_slots=batch)
        stack.enter_context(closing(engine))
        room = engine.capacity - _VERIFY_STEPS
        with closing(
            OrtBackend(
                bundle,
                manifest,
                num_slots=1,
                kv_capacity=engine.capacity,
                max_step_tokens=engine.max_step_tokens,
                fuse_attention=False,
                int8_activations=False,
            )
        ) as reference:
            random = np.random.default_rng(0)
            prompts = [
                random.integers(0, manifest.model.vocab_size, min(length, room)).tolist()
                for length in _VERIFY_TOKENS
            ]
            report = compare_backends(
                reference,
                engine,
                prompts,
                table,
                decode_steps=_VERIFY_STEPS,
                thresholds=default_thresholds(manifest, rounds=False),
                progress=progress,
            )
        if not report.passed:
            return Measured(None, "; ".join(report.misses))
        tokens = min(_PROMPT_TOKENS, engine.capacity - _OUTPUT_TOKENS)
        config = BenchConfig(max(tokens, 1), _OUTPUT_TOKENS, _REPEATS, batch=batch)
        samples = run_bench(engine, table, manifest, config, progress=progress)
        decode_s = median(step for steps in samples.itl_s for step in steps)
        return Measured(decode_s, None, median(samples.prefill_s))


def _choose(
    asked: BuildPlan,
    best: _Candidate | None,
    tuned: tuple[TunedRung, ...],
    refused: tuple[RefusedRung, ...],
    timings: bytes | None,
) -> tuple[Compiled, Climbed]:
    if best is None:
        reasons = [f"{describe(each)}: {each.reason}" for each in refused]
        reasons += [f"{describe(each)}: {each.problem}" for each in tuned]
        raise BuildError(
            f"no variant was built and answered right. {'; '.join(reasons)}. With --kernels "
            "tensorrt and without --tune an engine is built and not compared: edge-llm verify does"
        )
    plan = best.directory / read_engine_info(best.directory).plan
    compiled = replace(best.compiled, plan=_map(plan), timings=timings)
    return compiled, Climbed(best.rung, refused, asked.rebuild_options(), tuned)


def _map(path: Path) -> Any:
    with path.open("rb") as file:  # the map outlives the file
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
