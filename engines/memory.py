"""Will the build fit in memory? Asked before it starts: a killed build says nothing."""

from __future__ import annotations

from dataclasses import dataclass

from edge.bundle.manifest import Manifest
from edge.errors import ResourceError

# Peak resident memory of compiling with TensorRT for RTX 1.7 on a CPU, measured: SmolLM2 INT4
# (87 MB of weights) 0.94 GB, the 1.5B shape INT4 (921 MB) 3.34 GB. That is 0.69 GB and 2.9 times
# the weights; a little is added to both. NVIDIA tells users of its own builder 3 to 4 times.
_FIXED_BYTES = 800 << 20
_WEIGHT_FACTOR = 3.2


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated peak of a build, by part, and what is available; all in bytes."""

    weights_bytes: int
    builder_bytes: int
    workspace_bytes: int
    available_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Everything at once."""
        return self.weights_bytes + self.builder_bytes + self.workspace_bytes


def plan_memory(manifest: Manifest, workspace_bytes: int, available_bytes: int) -> MemoryPlan:
    """Estimate a build.

    Args:
        manifest: of the bundle.
        workspace_bytes: scratch memory of the kernels that are tried; 0 where nothing runs.
        available_bytes: memory that can be had without swapping. On a Jetson it is the GPU's too.
    """
    name = f"{manifest.graphs.decoder}.data"
    weights = manifest.files[name].num_bytes if name in manifest.files else 0
    builder = _FIXED_BYTES + int((_WEIGHT_FACTOR - 1) * weights)
    return MemoryPlan(weights, builder, workspace_bytes, available_bytes)


def check_memory(plan: MemoryPlan) -> None:
    """Refuse a build that would be killed.

    Raises:
        ResourceError: the estimated peak exceeds what is available.
    """
    if plan.peak_bytes <= plan.available_bytes:
        return
    raise ResourceError(
        f"building needs about {plan.peak_bytes / 1e9:.1f} GB of memory (weights "
        f"{plan.weights_bytes / 1e9:.1f}, builder {plan.builder_bytes / 1e9:.1f}, workspace "
        f"{plan.workspace_bytes / 1e9:.1f}), but {plan.available_bytes / 1e9:.1f} GB are "
        "available; stop other programs (a desktop takes 1 to 2 GB), add swap, give a smaller "
        "--workspace, export with --quant int4, or try anyway with --force"
    )
