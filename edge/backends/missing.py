"""Finds what an engine on the GPU lacks first."""

from __future__ import annotations

from pathlib import Path

from edge.bundle.engine_file import find_engines, no_engine
from edge.device.gpu import find_gpu, load_driver
from edge.device.nodes import find_gpu_node
from edge.engine_config import EngineConfig
from edge.errors import BundleError, DependencyError

from .cuda.errors import explain_init_failure


def first_missing(
    error: DependencyError, config: EngineConfig, needs_engine: Path | None = None
) -> BundleError | DependencyError:
    """What lacks first, in the order in which it is got: GPU, driver, engine; else ``error``.

    Args:
        error: why nothing was opened.
        config: by which it was asked for.
        needs_engine: the bundle that must have an engine; None where it need not.
    """
    if find_gpu() is None:
        if find_gpu_node() is None:
            option = config.gpu_option or f"--backend {config.backend}"
            return DependencyError(
                f"{option} needs an NVIDIA GPU, and this machine shows none; leave it out, and "
                "the CPU computes; a container sees the GPU with --runtime nvidia"
            )
        try:
            load_driver()
        except OSError as reason:
            return DependencyError(explain_init_failure(f"Failed to dlopen: {reason}"))
    if needs_engine is not None and not find_engines(needs_engine):
        return no_engine(needs_engine)
    return error
