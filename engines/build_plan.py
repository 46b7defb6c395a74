"""Plans one engine before TensorRT is loaded: options that fit the bundle, and the profiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edge.adapters.graph_inputs import adapted_linears, read_section
from edge.bundle.engine_file import Attention, Kernels, KvRead, Scales
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import ALIGNMENT, ENGINE_FLOAT_BYTES
from edge.errors import ConfigError
from edge.model.spec import ModelSpec

from .config import KV_READS, BuildConfig, BuildShapes, resolve
from .profiles import Profile, make_profiles


@dataclass(frozen=True)
class BuildPlan:
    """A bundle and everything decided about its engine; `plan_build` makes one for each build.

    Attributes:
        config: the options as given.
        manifest: the bundle's manifest.
        shapes: the options filled in for this model.
        profiles: the optimization profiles, in the order in which the engine has them.
        scales: ``fp32`` widens the scales of INT8 inputs; no option asks for it, `fallbacks` do.
    """

    config: BuildConfig
    manifest: Manifest
    shapes: BuildShapes
    profiles: tuple[Profile, ...]
    scales: Scales = "stored"

    @property
    def kv_read(self) -> KvRead:
        """How attention reads the cache; with ``auto``, the way that is tried first."""
        return KV_READS[0] if self.config.kv_read == "auto" else self.config.kv_read

    @property
    def kernels(self) -> Kernels:
        """Whose kernels compute products and attention; with ``auto``, those tried first."""
        return "own" if self.config.kernels == "own" else "tensorrt"

    @property
    def attention(self) -> Attention | None:
        """How attention must build; None if the dialect has neither TensorRT's nor our own."""
        if self.config.attention == "own":
            return "own"
        if self.manifest.dialect != "native":
            return None
        return "fused" if self.config.attention == "fused" else "decomposed"

    @property
    def changes_graph(self) -> bool:
        """Whether the engine's graph differs from the bundle's (`engines.graph.adapt`)."""
        capacity = self.manifest.kv_capacity
        if self.manifest.head is not None:
            return True  # it has one more output
        found = (self.shapes.capacity, self.kv_read, self.scales, self.shapes.best_logits)
        return found != (capacity, "slice", "stored", 0)

    def rebuild_options(self) -> dict[str, Any]:
        """Options of ``edge-llm build`` that build this engine again."""
        config, shapes = self.config, self.shapes
        return {
            "max_batch": shapes.max_batch,
            "max_prefill": shapes.max_prefill,
            "kv_capacity": shapes.capacity,
            "kv_buckets": list(shapes.kv_buckets) if config.kv_read == "slice" else None,
            "kv_read": config.kv_read,
            "attention": config.attention,
            "tune": config.tune,
            "workspace": config.workspace_bytes,
            "opt_level": config.opt_level,
            **({"best_logits": shapes.best_logits} if shapes.best_logits else {}),
            "kernels": config.kernels,  # the default differs on a Jetson
            **({"plugins": config.plugins} if config.plugins != "auto" else {}),
        }


def plan_build(config: BuildConfig, manifest: Manifest) -> BuildPlan:
    """Fill in the options for a bundle, check them, and make the profiles.

    Raises:
        ConfigError: an option does not fit the model, as `config.resolve` and `check_aligned` find.
        BundleError: a section of the manifest cannot be read (`read_section`).
    """
    shapes = resolve(config, manifest)
    section = read_section(manifest)
    rank = 0 if section is None else section.rank
    check_aligned(manifest.model, rank)
    profiles = make_profiles(manifest.model, manifest.dialect, manifest.dtype, shapes, rank)
    return BuildPlan(config, manifest, shapes, profiles)


def check_aligned(model: ModelSpec, rank: int) -> None:
    """Refuse a rank at which the slots of an engine would not be aligned.

    Raises:
        ConfigError: A or B of a slot does not end at a multiple of `ALIGNMENT` bytes.
    """
    widths = {size for layer in adapted_linears(model) for size in layer.shape}
    step = max(ALIGNMENT // math.gcd(ALIGNMENT, size * ENGINE_FLOAT_BYTES) for size in widths)
    if rank % step:
        raise ConfigError(
            f"adapters of rank {rank} put slots at addresses that TensorRT refuses; export the "
            f"bundle with --adapters {-(-rank // step) * step}, a multiple of {step}"
        )
