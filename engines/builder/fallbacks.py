"""Lists the variants that a build tries in turn where the user leaves it a choice.

TensorRT decomposes an attention only where no fused kernel supports it (NvInfer.h of 10.16,
``IAttention::setDecomposable``). So decomposition may be allowed from the start: a prefill that can
be fused is, even beside a decode that cannot. With ``--kv-read auto`` the rungs are ways to read
the cache. Where inputs are rounded to INT8 with 16-bit scales, all of these come again with FP32
scales, since some TensorRT versions take no others (NVIDIA/TensorRT#4832). With ``--kernels auto``
all of these come with TensorRT's kernels and with our own, and attention in own kernels comes
before TensorRT's; `tune` decides which of them it builds. A choice that the user names is never
varied: it builds, or it fails with TensorRT's reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edge.bundle.engine_file import EngineInfo, Kernels, KvRead, RefusedRung, Scales, TunedRung
from edge.bundle.schemes import SCHEMES
from edge.bundle.verified_files import verify_files
from edge.errors import BuildError
from edge_make.progress import Progress, silent
from engines.build_plan import BuildPlan, plan_build
from engines.compiler import compat, support
from engines.compiler.compat import TensorRT
from engines.config import KERNELS, KV_READS, AttentionChoice
from engines.graph.adapt import has_half_scales

from .target import Target
from .variant import Compiled, compile_bundle

T = TypeVar("T")


@dataclass(frozen=True)
class Climbed:
    """The variant that was built in the end, and how it was chosen.

    Attributes:
        build: the rung that was built.
        refused: rungs before it, with TensorRT's reasons.
        options: options of ``edge-llm build``, as the user gave them.
        tuned: variants that were built and tried on the device, if any.
    """

    build: BuildPlan
    refused: tuple[RefusedRung, ...]
    options: dict[str, Any]
    tuned: tuple[TunedRung, ...] = ()


def make_rungs(asked: BuildPlan, rt: TensorRT) -> list[BuildPlan]:
    """Make the builds to try, in order; there is one if nothing is left to choose.

    Raises:
        DependencyError: TensorRT is too old for the dialect or for what was asked.
        IntegrityError: the graph is missing or damaged.
    """
    config, manifest = asked.config, asked.manifest
    reads: list[KvRead] = [asked.kv_read]
    if config.kv_read == "auto":
        reads = [read for read in KV_READS if read != "lengths" or _has_lengths(asked, rt)]
    own_too: list[AttentionChoice] = ["own"] if config.attention == "auto" else []
    kernels: tuple[Kernels, ...] = KERNELS if config.kernels == "auto" else (asked.kernels,)
    rungs = [
        replace(
            plan_build(
                replace(
                    config,
                    kv_read=read,
                    attention=attention,
                    kernels=kernel,
                    plugins=config.plugins if kernel == "own" else "auto",
                ),
                manifest,
            ),
            scales=scales,
        )
        for kernel in kernels
        for scales in scales_to_try(asked)
        for attention in (*(own_too if kernel == "own" else ()), config.attention)
        for read in reads
    ]
    for rung in rungs:
        support.check_support(rt.flavour, rt.version, manifest.dialect, rung.kv_read)
    return rungs


def scales_to_try(asked: BuildPlan) -> tuple[Scales, ...]:
    """Return ``stored``, then ``fp32`` if inputs or the cache are INT8 with 16-bit scales.

    Raises:
        IntegrityError: the graph, which has to be read for that, is missing or damaged.
    """
    linears = asked.manifest.quantization.linears.values()
    rounds_inputs = any(SCHEMES[linear.scheme.kind].int8_inputs for linear in linears)
    if not rounds_inputs and asked.manifest.kv_cache is None:
        return ("stored",)
    bundle, decoder = asked.config.bundle, asked.manifest.graphs.decoder
    verify_files(bundle, asked.manifest, [decoder])
    graph = bundle / decoder
    return ("stored", "fp32") if has_half_scales(graph.read_bytes()) else ("stored",)


def _has_lengths(asked: BuildPlan, rt: TensorRT) -> bool:
    return asked.manifest.dialect == "native" and compat.has_lengths(rt)


def climb(
    asked: BuildPlan, rungs: list[BuildPlan], attempt: Callable[[BuildPlan], T]
) -> tuple[T, Climbed]:
    """Try rungs until one is built.

    Args:
        asked: what the user asked for.
        rungs: from `make_rungs`.
        attempt: builds one rung.

    Raises:
        BuildError: no rung could be built; the message has every reason.
    """
    refused: list[RefusedRung] = []
    last = BuildError("nothing was tried")
    for rung in rungs:
        try:
            built = attempt(rung)
            return built, Climbed(rung, tuple(refused), asked.rebuild_options())
        except BuildError as error:
            if len(rungs) == 1:
                raise
            refused.append(refused_rung(rung, error))
            # Do not keep the error itself: its frames hold the builder, and so all weights.
            last = BuildError(str(error), error.cause)
    if len({rung.reason for rung in refused}) == 1:
        raise last  # it has nothing to do with what was varied
    reasons = "; ".join(f"{describe(rung)}: {rung.reason}" for rung in refused)
    raise BuildError(f"TensorRT built none of {len(refused)} variants. {reasons}")


def refused_rung(rung: BuildPlan, reason: Exception) -> RefusedRung:
    """Make the record of a rung that was not built."""
    return RefusedRung(rung.kv_read, rung.attention, str(reason), rung.scales, rung.kernels)


def describe(rung: RefusedRung | TunedRung | BuildPlan | EngineInfo) -> str:
    """Describe a rung in words."""
    wide = ", scales in FP32" if rung.scales == "fp32" else ""
    own = ", own kernels" if rung.kernels == "own" else ""
    attention = rung.attention or "of primitive operators"
    return f"attention {attention}, cache read as {rung.kv_read}{wide}{own}"


def compile_first(
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
