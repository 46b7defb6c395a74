"""Compiles a bundle with TensorRT for RTX on a machine without a GPU, and audits the result."""

from __future__ import annotations

from dataclasses import dataclass

from edge.bundle.engine_file import Attention, KvRead, LayerCount, RefusedRung, WeightBytes
from edge.bundle.onnx_file import OnnxFile
from edge.bundle.trust import open_manifest
from edge.device.memory import read_available_memory_bytes
from edge.errors import BuildError
from edge_make.progress import Progress, silent, uncounted
from engines.build_plan import BuildPlan, plan_build
from engines.builder.encoder import compile_encoder
from engines.builder.fallbacks import compile_first
from engines.builder.memory import check_memory
from engines.builder.scratch import DecodeScratch, compare_decode_scratch
from engines.builder.target import find_target
from engines.compiler import support
from engines.config import BuildConfig
from engines.graph.adapt import graph_of
from engines.graph.external_weights import constants_inside
from engines.graph.own_kernels import LARGE_BYTES, use_own_kernels
from engines.rules.facts import GraphFacts

from .step_bytes import StepCost, step_costs, work_of_graph

COMPUTE_CAPABILITIES = {80: "8.0", 86: "8.6", 89: "8.9", 120: "12.0"}


@dataclass(frozen=True)
class OwnBytes:
    """Bytes of weights inside and outside of an engine with own kernels.

    Attributes:
        outside_bytes: weights in a file beside the plan, which feeds the engine's inputs.
        inside_bytes: all constants that TensorRT still holds.
        large: constants of at least `own_kernels.LARGE_BYTES` by name, the largest first.
        left: layers that own kernels do not compute, each with the reason.
    """

    outside_bytes: int
    inside_bytes: int
    large: dict[str, int]
    left: dict[str, str]


@dataclass(frozen=True)
class CheckReport:
    """The result of a compilation and its audit.

    Attributes:
        problems: one sentence for each problem; empty if there is none.
        attentions: number of attentions in the parsed network.
        kv_read, attention: the variant that was compiled, where the options leave a choice.
        refused: variants that failed before it, with TensorRT's reasons.
        weights: stored type of the linear layers' weights, counted by type.
        layers: layers of the parsed network by kind and type.
        encoder_plan_bytes: size of the vision encoder's plan; None for a text bundle.
        scratch_bytes: scratch memory of each profile by name; empty if TensorRT did not say.
        decode_scratch: scratch memory to decode one sequence, next to that with float weights;
            None without packed weights.
        steps: bytes that a step of each profile reads, and how fast each module can be at best.
        own: weights that TensorRT would hold with own kernels, counted without compiling; None if
            own kernels can compute nothing here.
    """

    bundle: str
    tensorrt_version: str
    compute_capability: str
    problems: tuple[str, ...]
    attentions: int
    kv_read: KvRead
    attention: Attention | None
    refused: tuple[RefusedRung, ...]
    weights: tuple[WeightBytes, ...]
    layers: tuple[LayerCount, ...]
    plan_bytes: int
    encoder_plan_bytes: int | None
    scratch_bytes: dict[str, int]
    decode_scratch: DecodeScratch | None
    steps: tuple[StepCost, ...]
    own: OwnBytes | None
    build_s: float
    peak_memory_bytes: int | None

    @property
    def passed(self) -> bool:
        """Whether the check found no problems."""
        return not self.problems


def check_bundle(config: BuildConfig, sm: int = 86, progress: Progress = silent) -> CheckReport:
    """Compile every profile for a GPU that need not be present; write nothing.

    Args:
        config: options of the build to check.
        sm: compute capability without the dot; a key of `COMPUTE_CAPABILITIES`.
        progress: called in the steps of `compile_first`, and in `scratch`.

    Raises:
        DependencyError: TensorRT for RTX is missing.
        ResourceError: there is too little memory.
        BuildError: TensorRT refused the graph or failed to compile it.
    """
    build = plan_build(config, open_manifest(config.bundle))
    target = find_target(COMPUTE_CAPABILITIES[sm])
    support.check_support(
        target.rt.flavour, target.rt.version, build.manifest.dialect, build.kv_read
    )
    if not config.force:
        check_memory(build.manifest, 0, read_available_memory_bytes())
    compiled, climbed = compile_first(build, target, progress=progress)
    encoder = compile_encoder(build, target.rt, target.compute_capability, progress)
    with uncounted(progress, "scratch"):
        scratch = compare_decode_scratch(climbed.build, target.rt, target.compute_capability)
    return CheckReport(
        str(config.bundle),
        f"{target.rt.flavour} {target.rt.version}",
        target.compute_capability,
        (
            *compiled.audit.problems,
            *([] if scratch is None else scratch.problems),
            *([] if encoder is None else encoder.problems),
        ),
        compiled.audit.attentions,
        climbed.build.kv_read,
        climbed.build.attention,
        climbed.refused,
        compiled.audit.weights,
        compiled.audit.layers,
        compiled.plan_bytes,
        None if encoder is None else encoder.num_bytes,
        compiled.scratch_bytes,
        scratch,
        _step_costs(climbed.build),
        own_bytes(climbed.build),
        round(compiled.build_s, 3),
        compiled.peak_memory_bytes,
    )


def own_bytes(build: BuildPlan) -> OwnBytes | None:
    """Rewrite a graph for own kernels and count what stays in it, without compiling.

    Args:
        build: the plan of the build.

    Returns:
        The counts, or None if own kernels can compute nothing in the graph.
    """
    bundle, manifest = build.config.bundle, build.manifest
    try:
        found = use_own_kernels(graph_of(build), manifest, bundle)
    except BuildError:
        return None
    inside = constants_inside(found.data)
    return OwnBytes(
        found.outside.num_bytes if found.outside else 0,
        sum(inside.values()),
        {name: size for name, size in inside.items() if size >= LARGE_BYTES},
        found.left,
    )


def _step_costs(build: BuildPlan) -> tuple[StepCost, ...]:
    bundle, manifest = build.config.bundle, build.manifest
    work = work_of_graph(GraphFacts(OnnxFile(graph_of(build)), bundle), manifest)
    return step_costs(work, build.shapes, build.kv_read)
