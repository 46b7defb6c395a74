"""One engine, decided before TensorRT is loaded: options that fit the bundle, and the profiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge.adapters.graph_inputs import check_aligned, read_section
from edge.bundle.engine_file import Attention, Kernels, KvRead, Scales
from edge.bundle.manifest import Manifest

from .config import KV_READS, BuildConfig, BuildShapes, resolve
from .profiles import Profile, make_profiles


@dataclass(frozen=True)
class BuildPlan:
    """What is built of which bundle; made once per build by `plan_build` and passed on.

    Attributes:
        config: the options as given.
        manifest: the bundle's manifest.
        shapes: the options filled in for this model.
        profiles: the optimization profiles, in the order in which the engine has them.
        scales: ``fp32`` widens the scales of INT8 inputs; no option asks for it, the ladder does.
    """

    config: BuildConfig
    manifest: Manifest
    shapes: BuildShapes
    profiles: tuple[Profile, ...]
    scales: Scales = "stored"

    @property
    def kv_read(self) -> KvRead:
        """How attention reads the cache; of ``auto`` the first that is tried."""
        return KV_READS[0] if self.config.kv_read == "auto" else self.config.kv_read

    @property
    def kernels(self) -> Kernels:
        """Whose kernels compute products and attention; of ``auto`` the first that is tried."""
        return "own" if self.config.kernels == "own" else "tensorrt"

    @property
    def attention(self) -> Attention | None:
        """What is asked of attention; None if the dialect has none of TensorRT's, nor own."""
        if self.config.attention == "own":
            return "own"
        if self.manifest.dialect != "native":
            return None
        return "fused" if self.config.attention == "fused" else "decomposed"

    @property
    def changes_graph(self) -> bool:
        """Whether the engine's graph is another one than the bundle's (`graph.prepare_graph`)."""
        capacity = self.manifest.kv_capacity
        if self.manifest.head is not None:
            return True  # it has an output more
        found = (self.shapes.capacity, self.kv_read, self.scales, self.shapes.best_logits)
        return found != (capacity, "slice", "stored", 0)

    def rebuild_options(self) -> dict[str, Any]:
        """Options of ``edge-llm build`` that give this engine again."""
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
            "kernels": config.kernels,  # on a Jetson the default is another one
            **({"plugins": config.plugins} if config.plugins != "auto" else {}),
        }


def plan_build(config: BuildConfig, manifest: Manifest) -> BuildPlan:
    """Fill in the options for a bundle, check them against it, and make the profiles.

    Raises:
        ConfigError: see `config.resolve` and `check_aligned`.
        BundleError: see `read_section`.
    """
    shapes = resolve(config, manifest)
    section = read_section(manifest)
    rank = 0 if section is None else section.rank
    check_aligned(manifest.model, rank)
    profiles = make_profiles(manifest.model, manifest.dialect, manifest.dtype, shapes, rank)
    return BuildPlan(config, manifest, shapes, profiles)
