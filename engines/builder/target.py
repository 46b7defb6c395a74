"""Finds the TensorRT that builds an engine, and the GPU that it is built for."""

from __future__ import annotations

from dataclasses import dataclass

from edge.device.gpu import Gpu, find_gpu
from edge.errors import DependencyError
from engines.compiler import compat
from engines.compiler.compat import TensorRT


@dataclass(frozen=True)
class Target:
    """The TensorRT that builds an engine, and the GPU that it is built for."""

    rt: TensorRT
    gpu: Gpu | None
    compute_capability: str

    @property
    def memory_release(self) -> tuple[int, int] | None:
        """TensorRT's release as memory estimates take it; None means TensorRT for RTX."""
        return self.rt.release if self.rt.flavour == "tensorrt" else None


def find_target(compute_capability: str | None = None, rt: TensorRT | None = None) -> Target:
    """Find TensorRT and the GPU to build for.

    Args:
        compute_capability: GPU to build for (``8.6``), even on a machine without one; needs
            TensorRT for RTX. None means this machine's GPU.
        rt: a TensorRT that is already loaded.

    Raises:
        DependencyError: no TensorRT, or no GPU where one is needed.
    """
    if rt is None:
        rt = compat.load("tensorrt-rtx" if compute_capability else None)
    gpu = find_gpu()
    if compute_capability is None:
        if gpu is None:
            raise DependencyError(
                "building an engine needs an NVIDIA GPU, and the CUDA driver finds none here; "
                "build on the device that will run it, or compile as a test with: "
                "edge-llm check BUNDLE"
            )
        compute_capability = gpu.compute_capability
    return Target(rt, gpu, compute_capability)
