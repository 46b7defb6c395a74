"""What a build tries, one after the other, where the user leaves a choice to it.

TensorRT's attention may be decomposed at once: it is where no fused kernel supports it and nowhere
else (NvInfer.h of 10.16, ``IAttention::setDecomposable``), so there is nothing to try before, and
a prefill that can be fused is, beside a decode that cannot. With ``--kv-read auto`` there are ways
to read the cache. Where inputs are rounded to INT8 with scales of 16 bits, all of this is tried
again with these scales in FP32, since some TensorRT may take no others (NVIDIA/TensorRT#4832). With
``--kernels auto`` all of this is tried with TensorRT's kernels and with our own, in which attention
in own kernels comes before TensorRT's; `tune` says what is built of it. What the user names
is not varied: it is built, or it fails with TensorRT's reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edge.bundle.engine_file import EngineInfo, Kernels, KvRead, RefusedRung, Scales, TunedRung
from edge.bundle.schemes import SCHEMES
from edge.bundle.verified_files import verify_files
from edge.errors import BuildError

from . import compat, support
from .build_plan import BuildPlan, plan_build
from .compat import TensorRT
from .config import KERNELS, KV_READS, AttentionChoice
from .graph import has_half_scales

T = TypeVar("T")


@dataclass(frozen=True)
class Climbed:
    """What a ladder came to.

    Attributes:
        build: the rung that was built.
        refused: rungs before it, with TensorRT's reasons.
        options: of ``edge-llm build``, as the user gave them.
        tuned: variants that were built and tried on the device, if they were.
    """

    build: BuildPlan
    refused: tuple[RefusedRung, ...]
    options: dict[str, Any]
    tuned: tuple[TunedRung, ...] = ()


def make_rungs(asked: BuildPlan, rt: TensorRT) -> list[BuildPlan]:
    """The builds to try, in order; one if nothing is left to choose.

    Raises:
        DependencyError: TensorRT is too old for the dialect or for what was asked.
        IntegrityError: see `scales_to_try`.
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
    """``fp32`` after ``stored`` where inputs, or the cache, are INT8 with scales of 16 bits.

    Raises:
        IntegrityError: the graph, which is looked into for that, is missing or damaged.
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
        attempt: builds one.

    Raises:
        BuildError: none was built; every reason is in the message.
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
            # Not the error itself: its frames have the builder, and with it all weights.
            last = BuildError(error.message, error.cause)
    if len({rung.reason for rung in refused}) == 1:
        raise last  # it is not about what was varied
    reasons = "; ".join(f"{describe(rung)}: {rung.reason}" for rung in refused)
    raise BuildError(f"TensorRT built none of {len(refused)} variants. {reasons}")


def refused_rung(rung: BuildPlan, reason: Exception) -> RefusedRung:
    """The record of a rung that was not built."""
    return RefusedRung(rung.kv_read, rung.attention, str(reason), rung.scales, rung.kernels)


def describe(rung: RefusedRung | TunedRung | BuildPlan | EngineInfo) -> str:
    """A rung in words."""
    wide = ", scales in FP32" if rung.scales == "fp32" else ""
    own = ", own kernels" if rung.kernels == "own" else ""
    attention = rung.attention or "of primitive operators"
    return f"attention {attention}, cache read as {rung.kv_read}{wide}{own}"
