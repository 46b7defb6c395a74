"""Compiles one variant of an engine by TensorRT's Python API: hashes, parser, audit, builder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge.bundle.engine_file import Plugins, SkippedTactics
from edge.bundle.verified_files import verify_files
from edge.errors import BuildError
from edge_make.progress import Progress, silent, uncounted
from edge_make.resident_memory import read_rss_peak_bytes, reset_rss_peak
from engines.build_plan import BuildPlan
from engines.compiler import compat, support
from engines.compiler.compat import Compiler
from engines.compiler.progress import STEP
from engines.compiler.skipped_tactics import CURE, skipped_tactics
from engines.graph.adapt import graph_files, graph_of
from engines.graph.external_weights import Outside
from engines.graph.own_kernels import OwnGraph, use_own_kernels
from engines.rules.bundle import refuse_illegal
from engines.rules.table import version_of

from .audit import Audit, audit_network, check_plan_bytes
from .memory import make_memory_free
from .scratch import scratch_by_profile
from .target import Target

_log = logging.getLogger(__name__)


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
    lines = warn_of_rules(build, target, graph)

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
        release = target.memory_release
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
    size_problems = check_size(plan.nbytes, build, target, kernels_bytes, found.linears)
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


def check_size(
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


def warn_of_rules(build: BuildPlan, target: Target, graph: bytes) -> list[str]:
    """Check the graph by the rules, before any parser; return lines for the log."""
    version = version_of(target.rt.flavour, target.rt.release)
    warnings = refuse_illegal(graph, build.config.bundle, build.manifest, version)
    return [f"warning: {line}" for line in warnings]
