"""Makes the optimization profiles: the least, the usual and the largest shape of every input.

`edge_make.engine_profiles.profile_limits` says which profiles exist. TensorRT picks kernels per
profile, so decode gets matrix-vector kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from edge.adapters.graph_inputs import linear_inputs, rank_sizes
from edge.bundle import io_spec
from edge.bundle.manifest import Dialect, FloatType
from edge.bundle.sizes import ProfileName, StepLimits
from edge.model.spec import ModelSpec
from edge_make.engine_profiles import profile_limits

from .config import BuildShapes

Shape = tuple[int, ...]

# A batch of several tokens is mostly drafts and the ends of prompts.
_USUAL_BATCH_TOKENS = 16


@dataclass(frozen=True)
class ShapeRange:
    """The least, usual (what kernels are tuned for) and largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Profile:
    """One optimization profile.

    Attributes:
        name: one of `edge.bundle.sizes.ProfileName`.
        inputs: every input of the graph in graph order.
    """

    name: ProfileName
    inputs: Mapping[str, ShapeRange]


def make_profiles(
    model: ModelSpec,
    dialect: Dialect,
    dtype: FloatType,
    shapes: BuildShapes,
    adapter_rank: int = 0,
) -> tuple[Profile, ...]:
    """Make the profiles, in the order in which the engine has them.

    With adapters each profile comes twice: at rank 0, where TensorRT drops the adapters' nodes, and
    at their rank. A range of ranks would double the launches.
    """
    buckets = shapes.kv_buckets
    kv = (buckets[0], buckets[len(buckets) // 2], buckets[-1])
    specs = io_spec.decoder_inputs(model, dialect, dtype, shapes.capacity)
    if adapter_rank:
        specs += [spec for pair in linear_inputs(model, dtype).values() for spec in pair]

    def profile(limits: StepLimits, rank: int) -> Profile:
        seq = min(limits.seq, _USUAL_BATCH_TOKENS) if limits.profile == "batch" else limits.seq
        # A prompt needs the logits of its last token; scoring and drafts need all.
        sizes = {
            io_spec.BATCH: (1, limits.batch, limits.batch),
            io_spec.SEQ: (1, seq, limits.seq),
            io_spec.NUM_LOGITS: (1, 1, limits.num_logits),
            io_spec.KV: kv,
            **{dim: (size, size, size) for dim, size in rank_sizes(rank).items()},
        }
        name = with_adapters(limits.profile) if rank else limits.profile
        return Profile(name, {spec.name: _range(spec, sizes) for spec in specs})

    limits = profile_limits(shapes.max_batch, shapes.max_prefill)
    ranks = (0, adapter_rank) if adapter_rank else (0,)
    return tuple(profile(each, rank) for rank in ranks for each in limits)


def _range(spec: io_spec.TensorSpec, sizes: Mapping[str, tuple[int, int, int]]) -> ShapeRange:
    least, usual, largest = (
        tuple(sizes[dim][i] if isinstance(dim, str) else dim for dim in spec.shape)
        for i in range(3)
    )
    return ShapeRange(least, usual, largest)


def with_adapters(profile: ProfileName) -> ProfileName:
    """Return the profile of an engine that runs the same steps at the adapters' rank."""
    return cast(ProfileName, f"{profile}-adapters")
