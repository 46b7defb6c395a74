"""Scratch memory of a compiled engine, by profile: does a step unpack weights?

A plan of packed weights may still unpack them while it runs: the compiler then reserves room for
the unpacked copy, writes it and reads it again in every step. That shows in its log only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import ENGINE_FLOAT_BYTES, activation_bytes, profile_limits

from .config import BuildShapes
from .profiles import Profile

_REPORTED = re.compile(r"Max Scratch Memory: (\d+) bytes")
# Of kernels that share the sums of a product, measured with TensorRT for RTX 1.7 for sm 86: 8.2 MB
# of the 8.2 that a decode step of a tiny float model takes, and of SmolLM2's 9.8.
_KERNEL_BYTES = 8 << 20


def scratch_by_profile(log: Sequence[str], profiles: Sequence[Profile]) -> dict[str, int]:
    """Bytes by profile, from the messages of a build; empty if it does not name each one."""
    found = [int(match[1]) for line in log if (match := _REPORTED.search(line))]
    if len(found) != len(profiles):
        return {}
    return {profile.name: size for profile, size in zip(profiles, found, strict=True)}


def check_decode_scratch(
    scratch: dict[str, int], manifest: Manifest, shapes: BuildShapes
) -> list[str]:
    """Whether the scratch of a decode step has room for an unpacked weight.

    It may hold what a float graph's does (the kernels', a layer's cache, the activations) and half
    of the largest integer weight in floats; an unpacked one takes all of that.
    """
    linears = manifest.quantization.linears
    packed = {n: math.prod(x.shape) for n, x in linears.items() if x.scheme.kind != "float"}
    if not packed or "decode" not in scratch:
        return []
    model = manifest.model
    rows = shapes.max_batch * shapes.capacity
    layer_cache = rows * io_spec.kv_bytes_per_token(model, manifest.dtype) // model.num_layers
    decode = [each for each in profile_limits(shapes.max_batch, 1) if each.profile == "decode"]
    step = activation_bytes(model, manifest.dialect, decode, shapes.capacity)
    of_floats = _KERNEL_BYTES + layer_cache + step
    largest = max(packed, key=packed.__getitem__)
    unpacked = ENGINE_FLOAT_BYTES * packed[largest]
    if scratch["decode"] <= of_floats + unpacked // 2:
        return []
    return [
        f"a decode step takes {scratch['decode']:,} bytes of scratch memory, where float weights "
        f"take {of_floats:,} at most and {largest} unpacked takes {unpacked:,}: weights are "
        "unpacked in every step; export the bundle again"
    ]
