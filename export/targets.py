"""Lists devices that a bundle may be for, and what each requires of the graph."""

from __future__ import annotations

from dataclasses import dataclass

from edge.bundle.manifest import Dialect


@dataclass(frozen=True)
class Target:
    """Requirements of a ``--target``.

    Attributes:
        dialects: dialects that this target takes; the first is the default.
        versions: TensorRT versions that must take the graph, from
            `engines.rules.table.VERSIONS`.
        wide_input_scales: whether scales of linears with INT8 inputs are FP32 in a graph typed
            FP16 or BF16 (NVIDIA/TensorRT#4832).
    """

    dialects: tuple[Dialect, ...]
    versions: tuple[str, ...] = ()
    wide_input_scales: bool = False


TARGETS: dict[str, Target] = {
    "jetpack6": Target(("portable",), ("10.3",)),
    "jetpack7": Target(("native", "portable"), ("10.16",), wide_input_scales=True),
    "trt11": Target(("native", "portable"), ("11.1", "11.4")),
    "cpu": Target(("native", "portable")),
}
"""Targets by the value of ``--target``."""
ANY = Target(("native", "portable"))
"""Target used if none is given."""
