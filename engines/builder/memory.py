"""Checks before a build that it fits in memory: a killed build says nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edge.bundle.engine_file import Kernels
from edge.bundle.manifest import Manifest
from edge.device.memory import make_free
from edge.errors import ResourceError
from edge.files import drop_cached, is_file, is_jetson, list_directory, open_file
from edge_lab.planner.memory import BuildMemory, plan_build_memory
from edge_make.engine_layers import engine_dtype
from engines.kernels.launch import GROUPS


def check_memory(
    manifest: Manifest,
    workspace_bytes: int,
    available_bytes: int | None,
    release: tuple[int, int] | None = None,
    kernels: Kernels = "tensorrt",
) -> None:
    """Refuse a build that would be killed.

    Args:
        manifest: the bundle's manifest.
        workspace_bytes: scratch memory of the kernels that are tried; 0 if none runs.
        available_bytes: memory that is available without swapping, which on a Jetson is the GPU's
            too; None if the system does not say, and then nothing is refused.
        release: TensorRT's release; None is TensorRT for RTX.
        kernels: ``own`` if TensorRT does not hold the weights that own kernels read.

    Raises:
        ResourceError: the estimated peak exceeds what is available.
    """
    needed = _plan(manifest, workspace_bytes, release, kernels)
    if available_bytes is None or needed.peak_bytes <= available_bytes:
        return
    raise ResourceError(
        f"building needs about {needed.peak_bytes / 1e9:.1f} GB of memory (weights "
        f"{needed.weights_bytes / 1e9:.1f}, builder {needed.builder_bytes / 1e9:.1f}, workspace "
        f"{needed.workspace_bytes / 1e9:.1f}), but {available_bytes / 1e9:.1f} GB are "
        "available; stop other programs (a desktop takes 1 to 2 GB), give a smaller --workspace, "
        "export with --quant int4, or try anyway with --force, which needs swap"
    )


def make_memory_free(
    directories: Iterable[Path],
    manifest: Manifest,
    workspace_bytes: int,
    release: tuple[int, int] | None,
    kernels: Kernels = "tensorrt",
) -> None:
    """Free as much memory on a Jetson as a build is estimated to need at its peak.

    TensorRT skips a tactic that needs more memory than is free, and cached files take up memory.

    Args:
        directories: directories whose files were just read.
        manifest: the bundle's manifest.
        workspace_bytes: scratch memory of the kernels that are tried.
        release: TensorRT's release; None is TensorRT for RTX.
        kernels: ``own`` if TensorRT does not hold the weights that own kernels read.
    """
    if not is_jetson():
        return
    for path in (path for each in directories for path in list_directory(each) if is_file(path)):
        with open_file(path) as file:
            drop_cached(file.fileno())
    make_free(_plan(manifest, workspace_bytes, release, kernels).peak_bytes)


def _plan(
    manifest: Manifest, workspace_bytes: int, release: tuple[int, int] | None, kernels: Kernels
) -> BuildMemory:
    """Plan the memory of a build; TensorRT does not hold weights that only own kernels read."""
    data = manifest.files.get(f"{manifest.graphs.decoder}.data")
    weights = data.num_bytes if data else 0
    if kernels == "own" and manifest.dtype == "fp16":
        weights -= sum(
            linear.num_bytes
            for linear in manifest.quantization.linears.values()
            if engine_dtype(linear.scheme, manifest.dtype) == "int4"
            and linear.scheme.group_size in GROUPS
        )
    return plan_build_memory(weights, workspace_bytes, release)
