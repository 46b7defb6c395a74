"""Builds the vision encoder of a bundle into a plan of its own, beside the decoder's."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from edge.bundle.manifest import ENGINES_DIR, Manifest
from edge.bundle.trust import open_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import BuildError
from edge.vision.section import IMAGE_ROWS, PIXEL_VALUES, VisionSection, read_vision
from edge_make.progress import Progress, silent, uncounted
from engines.build_plan import BuildPlan, plan_build
from engines.compiler.compat import Compiler, TensorRT
from engines.compiler.network import NetworkView
from engines.config import BuildConfig
from engines.graph.adapt import graph_files
from engines.profiles import Profile, ShapeRange
from engines.rules.bundle import refuse_illegal
from engines.rules.table import Release, version_of
from engines.trtexec.command import run_trtexec, trtexec_command

from .store import TRTEXEC_SCRATCH, EncoderPlan

_log = logging.getLogger(__name__)
_STEP = "vision encoder"


def source_files(manifest: Manifest) -> tuple[str, ...]:
    """List the files that an engine is built from: each graph and its weights."""
    section = read_vision(manifest)
    return graph_files(manifest) + (() if section is None else _files(section))


def _files(section: VisionSection) -> tuple[str, str]:
    return section.graph, f"{section.graph}.data"


def encoder_profile(section: VisionSection) -> Profile:
    """Make a profile for any number of tiles, tuned for one: other answers wait a tile at most."""
    tile = (3, section.tile_px, section.tile_px)
    tiles = ShapeRange((1, *tile), (1, *tile), (section.max_tiles, *tile))
    return Profile("prefill", {PIXEL_VALUES: tiles})


def compile_encoder(
    build: BuildPlan, rt: TensorRT, compute_capability: str, progress: Progress = silent
) -> EncoderPlan | None:
    """Check, parse and compile the encoder; return None for a text bundle.

    Args:
        build: the plan of the build, for its workspace and optimization level.
        rt: the TensorRT to compile with.
        compute_capability: the GPU's compute capability, e.g. ``8.7``.
        progress: called in this step.

    Raises:
        IntegrityError: a file of the bundle is damaged.
        BuildError: this TensorRT does not take the graph, or failed.
    """
    section = read_vision(build.manifest)
    if section is None:
        return None
    graph, warnings = _checked_graph(build, section, rt)
    for line in warnings:
        _log.debug("the vision encoder: %s", line)
    started = time.perf_counter()
    compiler = Compiler(rt, lambda severity, text: _log.debug("%s: %s", severity, text))
    try:
        with uncounted(progress, _STEP):
            network = compiler.parse(graph.read_bytes(), graph, "slice")
            plan, _ = compiler.build(
                [encoder_profile(section)],
                workspace_bytes=build.config.workspace_bytes,
                opt_level=build.config.opt_level,
                timings=None,
                compute_capability=compute_capability,
                progress=silent,
            )
    except BuildError as error:
        raise BuildError(f"the vision encoder: {error}", error.cause) from error
    problems = tuple(audit_encoder(network, section, build.manifest))
    seconds = time.perf_counter() - started
    return EncoderPlan(plan, plan.nbytes, section.max_tiles, seconds, problems)


def audit_encoder(network: NetworkView, section: VisionSection, manifest: Manifest) -> list[str]:
    """Find where the parser changed the network."""
    px, width = section.tile_px, manifest.model.hidden_size
    problems = []
    for what, found, name, shape in (
        ("inputs", network.inputs, PIXEL_VALUES, (-1, 3, px, px)),
        ("outputs", network.outputs, IMAGE_ROWS, (-1, section.rows_per_tile, width)),
    ):
        wanted = [(name, manifest.dtype, shape)]
        seen = [(each.name, each.dtype, each.shape) for each in found]
        if seen != wanted:
            problems.append(f"the encoder's {what} are {seen}, expected {wanted}")
    products = {
        out.dtype
        for layer in network.layers
        if layer.kind == "matrix_multiply"
        for out in layer.outputs
    }
    if products != {manifest.dtype}:
        types = ", ".join(sorted(products)) or "none"
        problems.append(f"the encoder's products are of {types}, expected {manifest.dtype} alone")
    return problems


def encoder_command(
    build: BuildPlan,
    section: VisionSection,
    version: Release,
    *,
    plan: Path | None = None,
    timing_cache: Path | None = None,
) -> list[str]:
    """Make the ``trtexec`` command for the encoder.

    Args:
        build: the plan of the build.
        section: the manifest's section of the encoder.
        version: TensorRT's version.
        plan: file to write the plan to; ``vision.plan`` in the current directory by default.
        timing_cache: file for ``trtexec``'s timings; by default as in `trtexec_command`.
    """
    return trtexec_command(
        build,
        version,
        onnx=build.config.bundle / section.graph,
        plan=plan or Path("vision.plan"),
        timing_cache=timing_cache,
        profiles=[encoder_profile(section)],
    )


def encoder_for_bundle(config: BuildConfig, version: Release) -> list[str]:
    """Make the encoder's command for ``--print-trtexec``; empty for a text bundle.

    Raises:
        BundleError: there is no bundle.
    """
    manifest = open_manifest(config.bundle)
    section = read_vision(manifest)
    if section is None:
        return []
    return encoder_command(plan_build(config, manifest), section, version)


def encoder_by_trtexec(
    build: BuildPlan, rt: TensorRT, say: Callable[[str], None], progress: Progress
) -> EncoderPlan | None:
    """Build the encoder with ``trtexec``; return None for a text bundle.

    Raises:
        BackendError: ``trtexec`` is missing or failed (`run_trtexec`).
        BuildError: this TensorRT does not take the graph.
    """
    section = read_vision(build.manifest)
    if section is None:
        return None
    for line in _checked_graph(build, section, rt)[1]:
        say(line)
    engines = build.config.bundle / ENGINES_DIR
    with (
        tempfile.TemporaryDirectory(prefix=TRTEXEC_SCRATCH, dir=engines) as scratch,
        uncounted(progress, _STEP),
    ):
        plan, cache = Path(scratch) / "vision.plan", Path(scratch) / "timing.cache"
        argv = encoder_command(build, section, rt.release, plan=plan, timing_cache=cache)
        say(" ".join(argv))
        result = run_trtexec(argv, say)
        data = plan.read_bytes()
    return EncoderPlan(data, len(data), section.max_tiles, result.seconds)


def _checked_graph(
    build: BuildPlan, section: VisionSection, rt: TensorRT
) -> tuple[Path, list[str]]:
    """Hash the encoder's files and check its graph by the rules; return its path and warnings."""
    bundle = build.config.bundle.resolve()
    verify_files(bundle, build.manifest, _files(section))
    graph = bundle / section.graph
    version = version_of(rt.flavour, rt.release)
    warnings = refuse_illegal(graph.read_bytes(), bundle, build.manifest, version)
    return graph, [f"warning: {line}" for line in warnings]
