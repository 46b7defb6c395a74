"""Finds the first thing that a GPU engine lacks."""

from __future__ import annotations

from pathlib import Path

from edge.backends.cuda.errors import explain_init_failure
from edge.bundle.engine_file import find_engines, no_engine
from edge.device.gpu import find_gpu, load_driver
from edge.device.nodes import find_gpu_node
from edge.engine_config import EngineConfig
from edge.errors import DependencyError


def raise_missing(
    error: DependencyError, config: EngineConfig, needs_engine: Path | None = None
) -> None:
    """Raise for the first missing thing, in the order of setting up: GPU, driver, engine.

    It returns if only what ``error`` names is missing.

    Args:
        error: why nothing was opened.
        config: options of the attempt.
        needs_engine: the bundle that must have an engine; None if it need not.

    Raises:
        DependencyError: there is no GPU, or no driver.
        BundleError: there is no engine.
    """
    if find_gpu() is None:
        if find_gpu_node() is None:
            option = config.gpu_option or f"--backend {config.backend}"
            raise DependencyError(
                f"{option} needs an NVIDIA GPU, and this machine shows none; leave it out, and "
                "the CPU computes; a container sees the GPU with --runtime nvidia"
            ) from error
        try:
            load_driver()
        except OSError as reason:
            failure = explain_init_failure(f"Failed to dlopen: {reason}")
            raise DependencyError(failure) from error
    if needs_engine is not None and not find_engines(needs_engine):
        raise no_engine(needs_engine) from error
